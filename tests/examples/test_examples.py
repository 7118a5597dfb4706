"""Every example is well-formed: configurations parse, scripts are valid shell, and their commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_llamapro.__main__ import COMMANDS
from megatron_llamapro.config.io import parse_run_config

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(ROOT.glob("examples/baselines/*.yaml"))
LAUNCHES = sorted(ROOT.glob("examples/slurm/*.yaml"))  # tests/launch reads these
YAMLS = sorted({*ROOT.glob("examples/**/*.yaml")} - {*OVERLAYS, *LAUNCHES})
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_parse(path: Path) -> None:
    config = parse_run_config(["--config", str(path)])
    stages = config.parallel.pipeline_stage_layers
    assert stages is None or len(stages) == config.parallel.pipeline_model_parallel_size


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_partial_configurations_parse_with_their_base(path: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(readme_yaml())
    config = parse_run_config(["--config", str(tmp_path / "run.yaml"), "--config", str(path)])
    assert config.model.checkpoint == "llama-2-7b-pro" and config.training.global_batch_size == 1024


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_valid_shell_and_name_existing_files(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o111
    text = path.read_text()
    for name in re.findall(r"\b(?:tools|examples)/[\w/]+\.(?:py|yaml)", text):
        assert (ROOT / name).is_file(), name
    assert set(re.findall(r"(?<!\S)llamapro ([\w-]+)(?: [\w-]+)? (?:--|\\\n)", text)) <= set(COMMANDS)


def test_the_readmes_configuration_parses(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(readme_yaml())
    assert parse_run_config(["--config", str(tmp_path / "run.yaml")]).training.global_batch_size == 1024


def readme_yaml() -> str:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return text


def test_the_readme_lists_every_command_in_order() -> None:
    named = re.findall(r"^\| `llamapro ([\w-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == list(COMMANDS)


def test_links_of_the_documents_exist() -> None:
    folders = ("docs/*.md", "examples/*/*.md", "benchmarks/*.md", "docker/*.md")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(path for glob in folders for path in ROOT.glob(glob))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
