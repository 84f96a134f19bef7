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
