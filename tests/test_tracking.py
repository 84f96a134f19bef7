"""MLflow's database survives whatever happens to the process that makes it."""

import signal
import subprocess
import sys

from paragraph_ocr.tracking import open_experiment

KILLED_IN_A_MIGRATION = """
import os, sys
from pathlib import Path
from sqlalchemy import Engine, event
from paragraph_ocr.tracking import open_experiment

@event.listens_for(Engine, "after_cursor_execute")
def kill(connection, cursor, statement, parameters, context, executemany):
    if "CREATE TABLE _alembic_tmp_experiments" in statement:
        os.kill(os.getpid(), 9)

open_experiment(Path(sys.argv[1]), name="first", uri=None)
"""


def test_a_database_whose_making_was_killed_is_made_again(tmp_path):
    # SQLite keeps the migration's temporary table, on which MLflow's next start would stumble
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_MIGRATION, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    client, experiment = open_experiment(tmp_path, name="second", uri=None)
    run = client.create_run(experiment)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert not (tmp_path / ".mlflow.db.part").exists()
