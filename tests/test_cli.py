"""The command line: verbs, and bad input as one message with exit code 2 and never a traceback."""

from __future__ import annotations

import dataclasses
import importlib
import random
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from vatt_engine import cli, tasks
from vatt_engine.schema import PATH, dump_yaml, to_dict
from vatt_engine.tasks.config import OWN_KEYS, RECIPES, PretrainConfig, load_config
from vatt_engine.tasks.finetune_config import FinetuneConfig
from vatt_engine.tasks.flags import _flags, parse_flags
from vatt_engine.tasks.retrieve import RetrieveConfig

DEMO = dump_yaml(to_dict(load_config("demo"))).splitlines()
LEAVES = dict(_flags(PretrainConfig))


def line_of(dotted: str) -> int:
    """Line of a dotted key in DEMO, from 1."""
    number = 0
    for depth, name in enumerate(dotted.split(".")):
        while not DEMO[number].startswith("  " * depth + name + ":"):
            number += 1
    return number + 1


def wrong_values(hint) -> list[str]:
    """YAML values that an annotation does not allow."""
    kinds = {hint, *typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return ["3", "[x, y]", "{a: 1}"]
    if typing.get_origin(hint) is typing.Literal:
        return ["zzz", "3", "[]"]
    values = ["[1]", "{a: 1}"]
    if bool in kinds:
        values += ["3", "maybe"]
    if int in kinds:
        values += ["1.5", "true"]
    if float in kinds:
        values += [".nan", "-.inf", "1e999", "true"]
    return values + (["3", "2.5"] if str in kinds else ["abc"])


def misspelt(rng: random.Random, name: str) -> str:
    """The name with a letter doubled, dropped, swapped or replaced; never another known one."""
    while True:
        i = rng.randrange(len(name))
        changed = rng.choice([name[:i] + name[i] + name[i:], name[:i] + name[i + 1 :], name[:i] + "q" + name[i + 1 :]])
        if changed and changed != name and not any(changed in leaf.split(".") for leaf in LEAVES):
            return changed


def mutated_yaml(seed: int) -> tuple[str, str, str]:
    """(YAML text, what the message starts with after the file's name, what it holds)."""
    rng = random.Random(seed)
    leaf = rng.choice([leaf for leaf in LEAVES if leaf.split(".")[-1] != "name"])
    number, lines, name = line_of(leaf), list(DEMO), leaf.split(".")[-1]
    indent = " " * (len(DEMO[number - 1]) - len(DEMO[number - 1].lstrip()))
    rest = next(
        (i for i in range(number, len(lines)) if not lines[i].startswith((indent + " ", indent + "-"))), len(lines)
    )
    kind = seed % 8
    if kind == 0:
        wrong = misspelt(rng, name)
        lines[number - 1] = lines[number - 1].replace(name, wrong, 1)
        return "\n".join(lines), f":{number}: ", f"{wrong} must be a field of"
    if kind in (1, 2, 3):
        value = rng.choice(wrong_values(LEAVES[leaf]))
        lines[number - 1 : rest] = [f"{indent}{name}: {value}"]
        return "\n".join(lines), f":{number}: ", leaf
    if kind == 4:
        tag = rng.choice(
            ["!!python/object/apply:os.system", "!!python/name:os.system", "!include", "!!binary", "!!set"]
        )
        lines[number - 1 : rest] = [f"{indent}{name}: {tag} x"]
        return "\n".join(lines), f":{number}: {leaf} must be a plain value, got the tag", "tag"
    if kind == 5:
        lines[number - 1 : rest] = lines[number - 1 : rest] * 2
        return "\n".join(lines), f":{rest + 1}: {leaf} must be given once, got it on line {number} too", leaf
    if kind == 6:
        lines[number - 1] = "\t" + lines[number - 1]
        return "\n".join(lines), ":", "must be one valid YAML mapping"
    lines[number - 1] = f"{indent}{name}: {rng.choice(['[1, 2', '{a: 1', chr(34) + 'abc', '*nowhere', '&', '%', '@x'])}"
    return "\n".join(lines[:number]), ":", "must be one valid YAML mapping"


def refused(capsys, argv: list[str]) -> str:
    """The one message of a command that must exit with 2."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("part", range(6))
def test_mutated_yaml_is_refused_with_its_line(tmp_path, capsys, part):
    path = tmp_path / "run.yaml"
    for seed in range(40 * part, 40 * part + 40):
        text, start, held = mutated_yaml(seed)
        path.write_text(text)
        message = refused(capsys, ["pretrain", str(path)])
        assert message.startswith(f"{path}{start}"), (seed, message)
        assert held in message, (seed, message)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def mutated_flags(seed: int) -> tuple[list[str], str]:
    """(flags, what the message holds)."""
    rng = random.Random(seed)
    leaf = rng.choice([leaf for leaf in LEAVES if leaf.split(".")[-1] != "name"])
    section, _, name = leaf.rpartition(".")
    kind = seed % 4
    if kind in (0, 1):
        flag = "--" + ".".join(filter(None, [section, misspelt(rng, name)]))
        return [flag, "3"], f"vatt pretrain: {flag} must be a flag of this command, got an unknown one."
    hint = LEAVES[leaf]
    open_list = typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is Ellipsis  # an empty one is a value
    if kind == 2 and not open_list:
        return [f"--{leaf}"], f"vatt pretrain: --{leaf} must be "
    kinds = {hint, *typing.get_args(hint)}
    if str in kinds:
        return [
            "stray",
            f"--{leaf}",
            "x",
        ], "vatt pretrain: the arguments before the flags must be flags only, got ['stray']"
    return [f"--{leaf}", "nan" if float in kinds else "zzz"], f"{leaf} must be "


@pytest.mark.parametrize("part", range(4))
def test_mutated_flags_are_refused_by_name(capsys, part):
    for seed in range(20 * part, 20 * part + 20):
        flags, held = mutated_flags(seed)
        message = refused(capsys, ["pretrain", "demo", *flags])
        assert held in message, (seed, message)


MESSAGES = [
    (["pretrian"], f"vatt: the verb must be one of {', '.join(cli.VERBS)}, got 'pretrian'."),
    (["pretrain", "demoo"], "vatt pretrain: recipe must be one of demo, vatt_bbs,"),
    (["pretrain", "vatt-mbz"], "got 'vatt-mbz'. Did you mean 'vatt_mbs'?"),
    (["pretrain", "none.yaml"], "none.yaml: the config file must exist, got no such file."),
    (["pretrain", "--resume", "nowhere"], "nowhere/config.yaml: the config file must exist, got no such file."),
    (["pretrain", "demo", "--engine.steps", "-3"], "vatt pretrain: --engine.steps must be at least 1, got -3."),
    (["pretrain", "demo", "--engine.precision", "bf61"], "'fp32', 'bf16', got 'bf61'. Did you mean 'bf16'?"),
    (["pretrain", "demo", "--optim.betas", "0.9"], "betas must be a list of 2, each a finite number, got '0.9'."),
    (
        ["pretrain", "demo", "--steps", "3"],
        "must be a flag of this command, got an unknown one. Did you mean '--engine.steps'?",
    ),
    (["pretrain", "demo", "--engine.steps=abc"], "vatt pretrain: --engine.steps must be an integer, got 'abc'."),
    (["pretrain", "demo", "--engine.steps", "3", "4"], "every word must belong to a flag, got 4."),
    (["pretrain", "demo", "--data.train", "nowhere.jsonl", "--out", "x/run"], "nowhere.jsonl"),
    (["pretrain", "demo", "--engine.steps", "3", "--engine.steps", "x"], "--engine.steps must be an integer, got 'x'."),
    (["pretrain", "demo", "--optim.qqqq", "1"], "got an unknown one. Known names: --optim.name, --optim.lr, --optim."),
    (["pretrain", "demo", "--out", ""], "vatt pretrain: --out must be the name of a folder, got ''."),
    (
        ["pretrain", "demo", "--engine.device", "cpu:7"],
        "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'cpu:7'.",
    ),
    (["retrieve", "run", "--data", "x", "--batch-size", "0"], "vatt retrieve: --batch_size must be at least 1, got 0."),
    (
        ["retrieve", "run", "--data", "x", "--num-windows=-1"],
        "vatt retrieve: --num_windows must be at least 1, got -1.",
    ),
    (["demo-data", "world", "--num-train", "99999999"], "num_train must be in 1..1000000, got 99999999."),
    (["retrieve", "--data", "a.jsonl"], "vatt retrieve: --run must be a string, got nothing."),
    (["retrieve", "run", "more"], "vatt retrieve: the arguments before the flags must be RUN, got ['run', 'more']."),
    (["visualize", "--data", "x", "--figure", "similarity"], "vatt visualize: --runs must be "),
    (
        ["visualize", "run", "--data", "x", "--figure", "tsne"],
        "vatt visualize: --figure must be one of 'tsne-classes', 'tsne-modalities', 'similarity', 'activation', got ",
    ),
    (
        ["visualize", "a", "--data", "x", "--figure", "activation", "--num-clips", "3"],
        "num_clips must be at least 4, got 3.",
    ),
    (["report", "a", "a"], "runs must name different run folders, got a a."),
    (["report", "run"], "config.yaml: the config file must exist"),
    (["doctor", "--foldr", "x"], "vatt doctor: --foldr must be a flag of this command, got an unknown one."),
]


@pytest.mark.parametrize(("argv", "message"), MESSAGES, ids=lambda value: " ".join(value)[:40])
def test_messages(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, argv)


def test_an_unknown_recipe_in_a_file_has_its_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("# my run\nrecipe: vatt_mbss\n")
    assert refused(capsys, ["pretrain", str(path)]).startswith(f"{path}:2: recipe must be one of demo, ")
    path.write_text("recipe: [demo]\n")
    assert refused(capsys, ["pretrain", str(path)]).startswith(f"{path}:1: recipe must be one of demo, ")


def test_a_file_stands_on_its_recipe(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: vatt-mbs\nschedule: {warmup-steps: 10000}\nengine:\n  seed: 3\n")
    config = load_config(str(path))
    recipe = load_config("vatt_mbs")
    assert (config.schedule.warmup_steps, config.engine.seed) == (10_000, 3)
    assert (config.model, config.data, config.optim) == (recipe.model, recipe.data, recipe.optim)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_goes_through_yaml(tmp_path, name):
    config = load_config(name)
    (tmp_path / "run.yaml").write_text(dump_yaml(to_dict(config)))
    assert load_config(str(tmp_path / "run.yaml")) == config


def test_official_recipes_are_the_released_settings():
    config = load_config("vatt-ma-medium")
    assert config.model.name == "vatt_ma_medium"
    assert (config.engine.steps, config.data.batch_size, config.engine.precision) == (500_000, 2048, "auto")
    schedule, optim = config.schedule, config.optim
    assert (optim.lr, schedule.final, schedule.warmup_steps, schedule.total_steps) == (1e-4, 5e-5, 5000, 500_000)
    assert (optim.name, optim.betas, optim.eps, optim.weight_decay, optim.clip_norm) == (
        "adam",
        (0.9, 0.999),
        1e-7,
        0,
        0,
    )
    assert (config.loss.form, config.loss.temperature, config.model.video.drop_token.keep_rate) == ("joint", 0.07, 0.5)


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [verb for verb in cli.VERBS if f"\n  {verb} " not in out] == []
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["pretrain", "--help"]) == 0
    assert "vatt_ma_large" in capsys.readouterr().out
    for argv in (["pretrain", "demo", "--help"], ["retrieve", "--help"], ["demo-data", "--help"], ["doctor", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 0
        assert f"usage: vatt {argv[0]}" in capsys.readouterr().out


def test_python_m():
    result = subprocess.run([sys.executable, "-m", "vatt_engine", "docter"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("got 'docter'. Did you mean 'doctor'?\n")


def test_output_that_nobody_reads_ends_quietly():
    command = f"{sys.executable} -m vatt_engine doctor | head -c 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("m0\n", "")


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    """Every path of every config, from a file and from flags; a shell leaves `--out=~/run` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("out: ~/run\ndata: {train: [~/a.jsonl, b.jsonl]}\ntext: {vectors: ~/v.bin}\n")
    config = load_config("~/run.yaml")
    assert (config.out, config.text.vectors) == (f"{tmp_path}/run", f"{tmp_path}/v.bin")
    assert config.data.train == (f"{tmp_path}/a.jsonl", "b.jsonl")
    config = parse_flags(config, ["--out=~/other", "--data.train", "~/{00..99}.tar"], prog="vatt pretrain")
    assert (config.out, config.data.train) == (f"{tmp_path}/other", f"{tmp_path}/{{00..99}}.tar")
    found = parse_flags(RetrieveConfig, ["~/run", "--data", "~/x.jsonl"], prog="vatt", positional=("run",))
    assert (found.run, found.data) == (f"{tmp_path}/run", f"{tmp_path}/x.jsonl")


NO_PATHS = {"device", "model", "name", "part", "split", "probes", "retrievals", "clip_prefix"}  # strings all the same


def test_every_field_that_is_a_string_is_a_path_or_known_as_none():
    found = {}
    for path in Path(tasks.__path__[0]).glob("*.py"):
        module = importlib.import_module(f"vatt_engine.tasks.{path.stem}")
        kinds = (kind for name, kind in vars(module).items() if name.endswith(("Config", "Arguments")))
        for kind in filter(dataclasses.is_dataclass, kinds):
            hints = typing.get_type_hints(kind, include_extras=True)
            found |= {f"{kind.__name__}.{field.name}": str(hints[field.name]) for field in dataclasses.fields(kind)}
    strings = {name for name, hint in found.items() if re.search(r"\bstr\b", hint) and "Literal" not in hint}
    assert {"RetrieveConfig.out", "DataConfig.train", "WordsConfig.vectors", "DemoDataConfig.directory"} <= strings
    paths = {name for name in strings if PATH in found[name]}
    assert {name for name in strings - paths if name.partition(".")[2] not in NO_PATHS} == set()


def test_the_keys_that_tell_configs_apart_are_those_that_differ():
    fields = {
        kind.verb: {field.name for field in dataclasses.fields(kind)} for kind in (PretrainConfig, FinetuneConfig)
    }
    assert set(OWN_KEYS["pretrain"]) == fields["pretrain"] - fields["finetune"]
    assert set(OWN_KEYS["finetune"]) == fields["finetune"] - fields["pretrain"]
