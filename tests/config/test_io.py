"""YAML files, overrides, and the user's view of a wrong one."""

import re
from pathlib import Path

import pytest

from megatron_llamapro.config.errors import ConfigError
from megatron_llamapro.config.fields import fields_of, names_of
from megatron_llamapro.config.io import dump_yaml, parse_run_config
from megatron_llamapro.config.schema import RunConfig

MINIMAL = """
model: {checkpoint: somewhere}
data: {train: [{prefix: a, weight: 2}, {prefix: b}], seq_length: 128, valid: {cpp: c}}
training: {train_iters: 3, micro_batch_size: 1, global_batch_size: 4}
optimizer: {lr: 1e-4}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def parse(run_yaml: Path, *overrides: str):
    return parse_run_config(["--config", str(run_yaml), *overrides])


def test_overrides_replace_yaml_values(run_yaml: Path) -> None:
    config = parse(run_yaml, "--parallel.tensor_model_parallel_size", "2", "--training.precision=fp32")
    assert config.optimizer.lr == 1e-4  # plain PyYAML reads 1e-4 as text
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.training.precision == "fp32"
    assert [(entry.prefix, entry.weight) for entry in config.data.train] == [("a", 2.0), ("b", 1.0)]
    assert config.data.valid == {"cpp": "c"}


def test_skipped_steps_are_numbers_and_ranges(run_yaml: Path) -> None:
    run_yaml.write_text(MINIMAL.replace("train_iters: 3", "train_iters: 20, skip_iterations: [7, 12-15]"))
    assert parse(run_yaml).training.skip_iterations == (7, "12-15")
    assert parse(run_yaml, "--training.skip_iterations", "[3, 4-5]").training.skip_iterations == (3, "4-5")


def test_a_resolved_config_reads_back_equal(run_yaml: Path, tmp_path: Path) -> None:
    config = parse(
        run_yaml,
        "--parallel.pipeline_model_parallel_size=2",
        "--parallel.pipeline_stage_layers=[3,2]",
        "--training.skip_iterations=[1,2-3]",
        '--optimizer.param_groups=[{"match": "*.linear_fc2.weight", "lr_mult": 0.5}]',
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert parse(resolved) == config


WRONG = {
    "two blocks": (MINIMAL + "optimizer: {min_lr: 0}", "run.yaml, line 6: 'optimizer' is given twice, first in line 5"),
    "a name twice": ("optimizer:\n  lr: 1\n  lr: 2", "run.yaml, line 3: 'lr' is given twice, first in line 2"),
    "no number": (MINIMAL.replace("1e-4", ".nan"), "run.yaml: optimizer.lr is nan: it must be finite"),
    "no weight": (MINIMAL.replace("weight: 2", "weight: .inf"), "data.train[0].weight is inf: it must be finite"),
    "a holder of anchors": ("x: &b {prefix: a}", "run.yaml: x does not exist: the top level takes model, data,"),
    "where anchors stand": ("x: &b {prefix: a}", "put an anchor (&x) where its value is first used"),
    "misspelt section": ("trainig: {train_iters: 3}", "trainig does not exist: did you mean training?"),
    "another section's": ("training: {lr: 3}", "training.lr does not exist: did you mean optimizer.lr?"),
    "a name that is no text": ("on: 3", "run.yaml: true does not exist"),
    "paths for entries": (
        "data: {train: [data/python]}",
        "data.train[0] is 'data/python': it must be a mapping: write",
    ),
    "the form of an entry": ("data: {train: [data/python]}", "write {prefix: data/python}"),
    "an entry without its path": ("data: {train: [{weight: 2}]}", "data.train[0] has no prefix: write {prefix: …}"),
    "an entry's misspelt field": (
        "data: {train: [{prefx: a}]}",
        "data.train[0].prefx does not exist: did you mean data.train[0].prefix?",
    ),
    "a number for text": ("logging: {wandb_project: 12}", "logging.wandb_project is 12: it must be text: write '12'"),
    "a word for text": (
        "logging: {wandb_project: on}",
        "logging.wandb_project is true: it must be text: write it in quotes",
    ),
    "a number for a switch": ("data: {packing: 1}", "data.packing is 1: it must be true or false"),
    "a word of a list": (
        "recompute: {modules: [mlpp]}",
        "recompute.modules[0] is 'mlpp': it must be core_attn, mlp or moe, did",
    ),
    "no section": ("parallel: 3", "parallel is 3: it is a section: set its fields, e.g. parallel.tensor_model"),
    "octal": ("training: {train_iters: 010}", "training.train_iters is '010': it must be a whole number"),
    "home or nothing": ("checkpoint: {save: ~}", "checkpoint.save is '~': write ~/ for the home folder, or null"),
    "Python's nothing": ("checkpoint: {save: None}", "checkpoint.save is 'None': write null for none"),
    "a required null": (
        "model: {checkpoint: null}",
        "model.checkpoint, data.train, data.seq_length, training.train_iters",
    ),
    "a path that is null": ("data: {valid: {a: }}", "data.valid.a is null: give it a value"),
    "a name that YAML reads as a switch": ("data: {valid: {on: x}}", "data.valid has the name true, which is not text"),
    "an unquoted pattern": ("optimizer: {param_groups: [{match: *.w}]}", "put text that starts with * in quotes"),
    "two merges": ("a: &a {}\nx: {<<: *a, <<: *a}", "'<<' is given twice, first in line 2: write <<: [*a, *b]"),
    "nothing": ("# all of it a comment", "run.yaml is empty"),
    "a list": ("- a", "run.yaml is a list"),
    "open bracket": ("model: [", "run.yaml, line 1: while parsing a flow node, expected the node content"),
    "tabs": ("\tmodel: {}", "run.yaml, line 1: while scanning for the next token"),
    "two documents": ("--- {}\n--- {}", "run.yaml, line 2: expected a single document"),
    "an object": ("model: !!python/object:os.system x", "run.yaml, line 1: could not determine a constructor"),
    "deep": ("x: " + "[" * 5000, "run.yaml: too deeply nested"),
    "a circle": ("optimizer: &a {lr: *a}", "optimizer.lr is {'lr': {'lr':"),
    "a control character": ("a\1b: 3", "run.yaml: unacceptable character #x0001"),
    "misspelt key": (
        MINIMAL.replace("seq_length", "seq_lenght"),
        "data.seq_lenght does not exist: did you mean data.seq_length?",
    ),
    "wrong type": (MINIMAL.replace("train_iters: 3", "train_iters: three"), "training.train_iters"),
    "missing field": (MINIMAL.replace("model: {checkpoint: somewhere}", ""), "model.checkpoint"),
    "unknown precision": (MINIMAL.replace("global_batch", "precision: fp8, global_batch"), "fp8"),
    "not yaml": ("model: [", ""),
    "zero weight": (MINIMAL.replace("weight: 2", "weight: 0"), "weights must be above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_yaml_is_one_line(case: str, tmp_path: Path) -> None:
    text, expected = WRONG[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MINIMAL.encode("utf-16"), "run.yaml is UTF-16: save it as UTF-8"),
        (b"model: \xff\xff", "run.yaml is not text: byte 8 is not UTF-8"),
        (b"#" * (2**24 + 1), "run.yaml has more than 16 MiB"),
    ],
)
def test_a_file_that_is_not_text_is_refused(content: bytes, message: str, run_yaml: Path) -> None:
    run_yaml.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        parse(run_yaml)


def test_anchors_merges_quotes_and_a_bom_are_read(run_yaml: Path) -> None:
    """Anchors at their first use, `<<` overridden by the section's own names, quoted numbers, empty sections, a BOM."""
    run_yaml.write_text(
        "\ufeff"
        + MINIMAL.replace(
            "{prefix: a, weight: 2}, {prefix: b}", "&first {prefix: a, weight: 2}, {<<: *first, prefix: b}"
        )
        + "checkpoint: # nothing yet\nparallel: {tensor_model_parallel_size: '2'}\nlogging: {wandb_project: ~}\n"
    )
    config = parse(run_yaml)
    assert [(entry.prefix, entry.weight) for entry in config.data.train] == [("a", 2.0), ("b", 2.0)]
    assert config.parallel.tensor_model_parallel_size == 2 and config.checkpoint.save is None
    assert config.logging.wandb_project is None


def test_a_missing_file_and_a_misspelt_option_are_refused(run_yaml: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        parse_run_config(["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match=r"did you mean --parallel\.tensor_model_parallel_size"):
        parse(run_yaml, "--parallel.tensor_model_parallel_siz", "2")


def test_print_config_prints_every_field(run_yaml: Path, capsys: pytest.CaptureFixture) -> None:
    """Anywhere on the command line, and also without the required fields."""
    printed = []
    for arguments in (
        ["--config", str(run_yaml), "--print_config"],
        ["--print_config", "--config", str(run_yaml)],
        ["--print_config"],
    ):
        with pytest.raises(SystemExit) as end:
            parse_run_config(arguments)
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == dump_yaml(parse(run_yaml))
    assert "checkpoint: null" in printed[2] and "tensor_model_parallel_size: 1" in printed[2]


def test_later_files_and_options_win(run_yaml: Path, tmp_path: Path) -> None:
    """Field by field. Lists, and names with values, are replaced whole unless an option sets one name."""
    (tmp_path / "more.yaml").write_text("data: {valid: {cpp: d}, train: [{prefix: e}]}\noptimizer: {min_lr: 1e-5}\n")
    config = parse(run_yaml, "--data.valid.python=f", "--config", str(tmp_path / "more.yaml"), "--optimizer", "{lr: 2}")
    assert (config.optimizer.lr, config.optimizer.min_lr) == (2.0, 1e-5)
    assert config.data.valid == {"cpp": "d"} and [entry.prefix for entry in config.data.train] == ["e"]
    assert parse(run_yaml, "--data.valid.python=f").data.valid == {"cpp": "c", "python": "f"}


OPTIONS = {
    "--lr 1e-3": "--lr does not exist: did you mean --optimizer.lr?",
    "--training.lr=1e-3": "--training.lr does not exist: did you mean --optimizer.lr?",
    "--train-iters 10": "--train-iters does not exist: did you mean --training.train_iters?",
    "--trainig.train_iters 10": "did you mean --training.train_iters?",
    "--num_layers 3": "did you mean --recompute.num_layers?",
    "--prefix x": "--prefix does not exist: did you mean --data.train=[{prefix: …}]?",
    "--data.train.prefix x": "did you mean --data.train=[{prefix: …}]?",
    "--data.train.0.prefix x": "--data.train.0.prefix does not exist: did you mean --data.train=[{prefix: …}]?",
    "--data.train[0].prefix x": "did you mean --data.train=[{prefix: …}]?",
    "--model.checkpoint.a.b x": "--model.checkpoint.a.b does not exist",
    "--optimizer.param_groups [{match: *.w}]": "put text that starts with * in quotes",
    "--parallel.pipeline_stage_layers 2 2": "it must be a list: write [2, 2]",
    "--data.train x": "--data.train is 'x': it must be a list: write [{prefix: x}]",
    "--model.trainable added_blocks": "--model.trainable is 'added_blocks': it must be a list: write [added_blocks]",
    "--model.trainable lora,embedding": "it must be a list: write [lora, embedding]",
    "--parallel.pipeline_stage_layers 3,2": "it must be a list: write [3, 2]",
    "--training.precision bf15": "it must be bf16 or fp32, did you mean bf16?",
    "--training.train_iters 1e3": "--training.train_iters is 1000.0: it must be a whole number: write 1000",
    "--optimizer.lr .inf": "--optimizer.lr is inf: it must be finite",
    "--optimizer.lr 1e300": "it is too large",
    "--training.train_iters 9999999999999999999": "it is too large",
    "--data.train [{prefx: a}]": "--data.train[0].prefx does not exist: did you mean --data.train=[{prefix: …}]?",
    "--optimizer x.yaml": "it is a section: set its fields, e.g. --optimizer.lr",
    "--optimizer.lr": "--optimizer.lr has no value: write --optimizer.lr=…",
    "--optimizer.lr --debug": "--optimizer.lr has no value",
    "--optimizer.lr=": "--optimizer.lr has no value",
    "run.yaml": "'run.yaml' follows no option: for a file, write --config run.yaml",
    "--config nowhere.yaml": "nowhere.yaml does not exist",
    "--config .": ". is a folder: name the YAML file in it",
    f"--config {'x' * 300}": "x: File name too long",
    "--data.num_workers -1": "data.num_workers is -1: it cannot be negative",
}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options[:60])
def test_a_wrong_option_is_refused_with_advice(options: str, run_yaml: Path) -> None:
    with pytest.raises(ConfigError) as error:
        parse(run_yaml, *options.split(" ", 1))
    assert OPTIONS[options] in str(error.value)


FIELDS = {name: name.rpartition(".")[2] for name, kind in names_of(RunConfig).items() if not fields_of(kind)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_suggestion_is_the_whole_dotted_name(name: str, run_yaml: Path) -> None:
    """For a field without its section and for a misspelt one, as an option and in a file."""
    section, field = name.split(".")
    if field not in fields_of(RunConfig):  # checkpoint is also a section
        with pytest.raises(ConfigError, match=rf"^--{field} does not exist: did you mean .*--{re.escape(name)}\b"):
            parse(run_yaml, f"--{field}=1")
    misspelt = field[:-1] + field[-1] * 2
    with pytest.raises(ConfigError, match=rf"^--{section}.{misspelt} does not exist: did you mean --{section}\.\w+\?$"):
        parse(run_yaml, f"--{section}.{misspelt}=1")
    run_yaml.write_text(f"{section}: {{{misspelt}: 1}}")
    with pytest.raises(
        ConfigError, match=rf"run.yaml: {section}.{misspelt} does not exist: did you mean {section}\.\w+\?$"
    ):
        parse(run_yaml)


def test_either_name_of_a_precision_is_accepted(run_yaml: Path) -> None:
    for word, canonical in (("bfloat16", "bf16"), ("bf16", "bf16"), ("float32", "fp32"), ("fp32", "fp32")):
        config = parse(run_yaml, "--training.precision", word)
        assert config.training.precision == canonical and f"precision: {canonical}\n" in dump_yaml(config)


def test_no_arguments_name_the_required_fields() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.checkpoint, data\.train, .* are not set: give --model\.checkpoint, or"
    ):
        parse_run_config([])


def test_help_describes_every_field(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse_run_config(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--optimizer.lr LR" in shown and "--model CONFIG" not in shown
