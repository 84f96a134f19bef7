"""Send what MLflow could not take while a run was going on.

python scripts/send.py outputs/runs/RUN
"""

import sys
from pathlib import Path

from paragraph_ocr import console
from paragraph_ocr.errors import UserError


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        console.say(__doc__ or "")
        return 0 if arguments else 2
    folder = Path(arguments[0])
    try:
        from paragraph_ocr.resume import read_story, write_story
        from paragraph_ocr.stored import read_config
        from paragraph_ocr.tracking import send_outbox

        experiment, story = read_config(folder), read_story(folder)
        run_id = send_outbox(
            folder,
            outputs=folder.resolve().parent.parent,
            uri=experiment.tracking.uri,
            run_id=story.get("mlflow_run_id"),
        )
        write_story(folder, mlflow_run_id=run_id)
    except UserError as error:
        console.error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
