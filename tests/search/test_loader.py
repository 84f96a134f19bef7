from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

from hydra_plugins.paragraph_ocr_sweeper import QuickLoader
from paragraph_ocr.config import register_schema
from paragraph_ocr.help import CONF

TRIALS = [
    ["model.decoder.depth=2", "optimizer.lr=0.001", 'name="0001 a=1, b=null"'],
    ["model.decoder.depth=3", "optimizer.lr=1e-05", "name=\"0002 c='x'\""],
    ["model=tiny", "model.decoder.depth=4"],
    ["model=base", "model.decoder.depth=4"],
    ["model=tiny", "model.decoder.depth=1"],
    ["model.encoder.horizontal_stride=8"],
    ["model.encoder.horizontal_stride=null"],
    ["model/encoder=resnet34", "+optimizer.extra.nesterov=false"],
    ["model/encoder=resnet34", "+optimizer.extra.nesterov=true"],
]


def test_a_config_made_of_another_is_the_one_hydra_composes():
    register_schema()
    hydras = ConfigLoaderImpl(config_search_path=create_config_search_path(str(CONF)))
    typed = ["search=smallest_model", "datamodule.num_train=20"]
    master = hydras.load_configuration("train", typed, run_mode=RunMode.MULTIRUN)
    quick = QuickLoader(hydras)
    for trial in [*TRIALS, *TRIALS]:
        for _ in range(2):  # once to check it, once to launch it
            made = quick.load_sweep_config(master, [*typed, *trial])
            composed = hydras.load_sweep_config(master, [*typed, *trial])
            for config in (made, composed):
                config.hydra.job.override_dirname = "not looked at"
            assert OmegaConf.to_container(made) == OmegaConf.to_container(composed)
