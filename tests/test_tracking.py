"""MLflow's database survives whatever happens to the process that makes it."""

import os
import signal

import pytest
from sqlalchemy import Engine, event

from paragraph_ocr.tracking import open_experiment


def killed_in_a_migration(outputs):
    """Begin to make a database in a fork that kills itself amid it; return how the fork ended."""

    def kill(connection, cursor, statement, parameters, context, executemany):
        if "CREATE TABLE _alembic_tmp_experiments" in statement:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        event.listen(Engine, "after_cursor_execute", kill)
        try:
            open_experiment(outputs, name="first", uri=None)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_database_whose_making_was_killed_is_made_again(tmp_path):
    # SQLite keeps the migration's temporary table, on which MLflow's next start would stumble
    assert killed_in_a_migration(tmp_path) == -signal.SIGKILL
    client, experiment = open_experiment(tmp_path, name="second", uri=None)
    run = client.create_run(experiment)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert not (tmp_path / ".mlflow.db.part").exists()
