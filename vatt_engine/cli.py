"""`vatt <verb>`: finds the verb, and turns bad input into one message and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vatt_engine.cpus import openmp_settings
from vatt_engine.output import lasting_output, say
from vatt_engine.refusals import describe
from vatt_engine.schema import ConfigError, nearest

VERBS = {  # verb -> (module with `main(argv) -> exit code`, what it does)
    "pretrain": ("vatt_engine.tasks.pretrain", "train a model on video, audio and text"),
    "finetune": ("vatt_engine.tasks.finetune", "train a classifier of actions, sounds or images on a trained tower"),
    "evaluate": ("vatt_engine.tasks.evaluate", "a classifier on labelled clips, over several views of each"),
    "probe": ("vatt_engine.tasks.probe", "linear classifiers on the frozen features of a trained run"),
    "retrieve": ("vatt_engine.tasks.retrieve", "zero-shot retrieval with a trained run, against chance"),
    "visualize": ("vatt_engine.tasks.visualize", "the paper's figures of trained runs, and the numbers behind them"),
    "report": ("vatt_engine.tasks.report", "one self-contained HTML page about trained runs, side by side"),
    "ablate": ("vatt_engine.tasks.ablate", "drop rates under equal budgets: runs, probes and retrieval as one table"),
    "prepare": ("vatt_engine.tasks.prepare", "transcode the files of a manifest into shards, once"),
    "data": ("vatt_engine.tasks.data", "manifests of known datasets; one index for prepared parts"),
    "plot": ("vatt_engine.tasks.plot", "draw what a run has logged"),
    "convert": ("vatt_engine.tasks.convert", "checkpoints to and from other formats"),
    "demo-data": ("vatt_engine.tasks.demo_data", "make a small learnable world of real media files"),
    "flops": ("vatt_engine.tasks.flops", "parameters and FLOPs of a model, beside the paper's"),
    "scale": ("vatt_engine.tasks.scale", "memory, traffic and speed of a run on paper, before renting GPUs"),
    "doctor": ("vatt_engine.tasks.doctor", "what this machine can do, and why not the rest"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0 done, 1 training could not go on, 2 bad input, 128 + the signal's number interrupted
    (Ctrl-C 130, SIGTERM 143, SIGUSR1 138; what training had done is saved). Output that nobody reads, that its encoding
    does not have or its disk does not take ends nothing.

    >>> main(["--help"])
    usage: vatt VERB ...
    ...
    0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    lasting_output()
    if "torch" not in sys.modules:  # OpenMP reads its settings once, when torch loads it
        os.environ.update(openmp_settings(os.environ))
    if argv and argv[0].startswith("--local_rank="):  # DeepSpeed's launcher puts it first; LOCAL_RANK says the same
        del argv[0]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    verb = argv[0].replace("_", "-")
    try:
        if verb not in VERBS:
            raise ConfigError(
                f"vatt: the verb must be one of {', '.join(VERBS)}, got {argv[0]!r}. {nearest(verb, VERBS)}"
            )
        return importlib.import_module(VERBS[verb][0]).main(argv[1:])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if sys.flags.dev_mode or (getattr(error, "name", None) or "").startswith("vatt_engine"):
            raise  # `python -X dev -m vatt_engine ...` shows where a message comes from
        say(describe(error))
        return 2
    except KeyboardInterrupt:
        say(f"vatt {verb}: interrupted.")
        return 130


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(["usage: vatt VERB ...", "", *lines, "", "`vatt VERB --help` shows what a verb takes."])


if __name__ == "__main__":
    sys.exit(main())
