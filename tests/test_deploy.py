"""What `deploy/` ships reads as the launchers read it."""

import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env

DEPLOY = Path(__file__).parents[1] / "deploy"


def launch(name: str) -> Namespace:
    """The arguments of `accelerate launch` under a shipped file."""
    given = ["--config_file", str(DEPLOY / name), "-m", "diffusify", "adapt"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    return args


def test_ddp() -> None:
    args = launch("ddp.yaml")
    assert args.multi_gpu and args.num_processes == 8 and args.module


def test_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    args = launch("fsdp2.yaml")
    assert args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage: int) -> None:
    """As far as can be told without DeepSpeed."""
    args = launch(f"zero{stage}.yaml")
    assert args.use_deepspeed and not args.zero3_init_flag or args.zero3_init_flag == "false"
    assert args.deepspeed_config_file == f"deploy/zero{stage}.json"
    config = HfDeepSpeedConfig(str(DEPLOY / f"zero{stage}.json"))
    assert config.is_zero3() == (stage == 3) and config.is_zero2() == (stage == 2)
    assert not config.is_offload() and config.get_value("gradient_accumulation_steps") == "auto"
    assert stage == 2 or config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")


def test_slurm() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "train.slurm")], check=True)
