"""What is typed for a curriculum of three stages that takes seconds."""

SMALL_CURRICULUM = [
    "curriculum=lines_to_page", "datamodule=synthetic_paragraphs", "datamodule.height=96",
    "datamodule.width=224", "datamodule.min_lines=1", "datamodule.max_lines=3",
    "datamodule.min_characters=10", "datamodule.mean_characters=30", "datamodule.max_characters=60",
    "datamodule.max_length=64", "datamodule.num_train=24", "datamodule.num_val=4",
    "datamodule.num_test=4", "datamodule.num_workers=0", "datamodule.batch_size=4",
    "~curriculum.corpora.four_lines", "~curriculum.corpora.seven_lines",
    "curriculum.corpora={one_line:{num_train:20,height:32,width:224,max_characters:20,"
    "mean_characters:10,max_length:24},two_lines:{num_train:20,height:64,width:224,"
    "max_characters:40,mean_characters:20,max_length:44}}",
    "curriculum.stages=[{corpora:{one_line:1},batch_size:8,below:100},"
    "{corpora:{two_lines:1,one_line:0.5},batch_size:4,max_steps:4},{corpora:{pages:1},batch_size:2}]",
    "curriculum.look_every=3", "curriculum.replay=0.3", "decoding.max_loss=0.1",
]  # fmt: skip
"""The first stage is over at the first look, the second at the third."""


INSTALLED = ["datamodule.fonts=null", "datamodule.held_out=[]", "datamodule.texts=null"]
"""What stands in for that which scripts/fetch.py brings."""

_RENDERED = ["trainer=cpu", "datamodule.placement=disk", *INSTALLED]

RECIPES = {
    "ten_minutes": _RENDERED,
    "one_hour": [*_RENDERED, "trainer.compile=false"],
    "ablation": _RENDERED,
    "iam_finetune": ["datamodule.root=tests", "model.weights=null"],
    "iam_from_scratch": ["datamodule.root=tests"],
}
"""What an experiment needs of its user, where there is no GPU."""

FEW_STAGES = [
    *(
        f"~curriculum.corpora.{name}"
        for name in ("two_lines", "four_lines", "seven_lines", "first_pages")
    ),
    *(
        f"curriculum.corpora.{name}.{change}"
        for name in ("one_line", "full_pages", "old_pages", "late_pages")
        for change in (
            "num_train=8", "width=160", "height=48", "min_lines=1", "max_lines=1",
            "min_characters=4", "mean_characters=10", "max_characters=20", "max_length=24",
        )
    ),
    "curriculum.stages=[{corpora:{one_line:1,full_pages:1,old_pages:1,late_pages:1},batch_size:2,max_steps:1},"
    "{corpora:{full_pages:1,old_pages:1,late_pages:1},batch_size:2}]",
    "curriculum.look_every=1",
]  # fmt: skip
"""What makes two steps of a recipe that renders its stages: all in the first one, so that no process
renders beside, which would only be waited for."""
