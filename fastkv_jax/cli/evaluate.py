"""Ask a model the questions of a suite, under one method or a grid of them, and write down every answer.

  evaluate.py --suite ruler --lengths 4096 8192 --samples 20 --output results/
  evaluate.py --suite longbench --data LongBench/ --method snapkv --retention-rate 0.1 --output results/
  evaluate.py --suite needle --lengths 2048 4096 --depths 5 --output results/
  evaluate.py --suite evidence --output results/              (configs/suites/evidence.yaml: suites x methods)

A run that was interrupted goes on when the same command is given again. Each method's folder has run.json, part files
with a line for each sample, and results.jsonl at the end; table.md, .csv and .json compare the methods.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from fastkv_jax.cli.flags import common, joining, meshes, settings
from fastkv_jax.cli.flags import grid as grids
from fastkv_jax.errors import FastKVConfigError, InputError
from fastkv_jax.methods import presets

PICTURES = ("needles.png", "frontier.png")
TABLES = (("table.md", "as_markdown"), ("table.csv", "as_csv"), ("table.json", "as_json"))


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="evaluate.py", description=__doc__)
    common.add_model_flags(parser)
    group = parser.add_argument_group("questions")
    group.add_argument("--suite", required=True, metavar="NAME", help="ruler, longbench, needle, perplexity, or "
                       "a grid: a name in configs/suites or a .yaml file")  # fmt: skip
    group.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="of the suite (default: all that it has)")
    group.add_argument("--lengths", type=int, nargs="+", default=[], metavar="N", help="tokens, answer included")
    group.add_argument("--samples", type=int, metavar="N", help="of each task and length, >= 1")
    group.add_argument("--depths", type=int, metavar="N", help="needle: places in the text, >= 1 (default: 10)")
    group.add_argument("--data", metavar="FOLDER", help="published data: LongBench's <task>.jsonl, or RULER's "
                       "<length>/<task>.jsonl; gs:// works with the extra gcs")  # fmt: skip
    group.add_argument("--texts", metavar="FOLDER", help=".txt files to hide needles in (default: our own chronicle)")
    group.add_argument("--protocol", metavar="NAME", help="longbench: upstream (default) or fastkv")
    group.add_argument("--seed", type=int, default=42, help="of what is made, 0 to 2**32 - 1 (default: 42)")
    group.add_argument("--query-agnostic", action="store_true", help="compress the context before the question is read")
    common.add_template_flags(group)
    group = parser.add_argument_group("run")
    group.add_argument("--output", required=True, metavar="FOLDER", help="on a disk or gs://")
    group.add_argument("--overwrite", action="store_true", help="remove what another configuration left there")
    group.add_argument("--take-over", action="store_true", help="gs://: the process that held the folder is dead")
    group.add_argument("--batch-tokens", type=int, default=16_384, metavar="N", help="padded tokens at once, >= 1 "
                       "(default: 16384)")  # fmt: skip
    group.add_argument("--max-rows", type=int, default=8, metavar="N", help="rows of a batch, >= 1 (default: 8)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longer prompts are cut in the middle (default: the "
                       "model's context)")  # fmt: skip
    group.add_argument("--mesh", metavar="AXES", help=meshes.HELP)
    joining.add_flags(group)
    group.add_argument("--save-prompts", action="store_true", help="write the prompts down too")
    group.add_argument("--kv-dtype", choices=("int8", "float8_e4m3fn"), help="keep the prompt's entries in 8 bits")
    settings.add_method_flags(parser)
    common.add_run_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return common.run(_run, parser().parse(argv))


def _run(options: argparse.Namespace) -> int:
    from fastkv_jax.evals.suites.catalogue import SuiteSettings, check

    for name in ("batch_tokens", "max_rows"):
        if getattr(options, name) < 1:
            raise FastKVConfigError(f"{name} must be >= 1, got {getattr(options, name)}")
    axes = meshes.parse(options.mesh)
    grid = grids.read(options)
    suites = [grids.suite_settings(entry) for entry in grid["suites"]] if grid else [
        SuiteSettings(options.suite, tuple(options.tasks), tuple(options.lengths), options.samples, options.depths,
                      options.data, options.texts, options.protocol, options.seed)
    ]  # fmt: skip
    for suite in suites:
        check(suite)
        if suite.protocol == "fastkv" and options.query_agnostic:
            raise FastKVConfigError("--query-agnostic: protocol fastkv compresses with the question")
    settings.check(options)
    _check_output(options.output)
    share = joining.share(options)
    platform = common.choose_platform(options)
    common.use_compile_cache(options)
    return _evaluate(options, suites, grid, axes, platform, share)


def _check_output(output: str) -> None:
    """Raise `InputError` unless nothing is there, or only what an earlier run of this command has left."""
    from fastkv_jax.evals.records import folder

    path = folder.writable(output)
    if not path.is_dir():
        return
    for inside in path.iterdir():
        if inside.name.startswith((*folder.SCRATCH, joining.MET)):
            continue
        if inside.is_dir():
            folder.check_output(inside)
        elif inside.name not in [*PICTURES, *(name for name, _ in TABLES)]:
            raise InputError(f"{output} holds {inside.name}, which no run has left there; give a new folder")


def _evaluate(
    options: argparse.Namespace, suites, grid, axes: dict[str, int], platform: str, share: joining.Share | None
) -> int:
    from fastkv_jax import checkpoint, text
    from fastkv_jax.cli.asking.report import Reporter
    from fastkv_jax.evals.engine import ModelEngine
    from fastkv_jax.evals.suites import catalogue

    say = Reporter(quiet=options.quiet)
    dtype = common.dtype_for(options, platform)
    say.header(platform, dtype)
    found = checkpoint.resolve(options.model, tokenizer=options.tokenizer, progress=not options.quiet)
    config = checkpoint.inspect(found)
    say.attention(platform, dtype, config.head_dim)
    limit = options.max_tokens or config.max_position_embeddings
    if not 1 <= limit <= config.max_position_embeddings:
        raise FastKVConfigError(f"max_tokens must be in 1 ... {config.max_position_embeddings:,}, got {limit}")
    runs = grids.runs(options, grid, found.name, config.num_layers)
    tokenizer = text.load_tokenizer(found)
    text.check_vocabulary(tokenizer, config)
    there = _date_there(options, runs)
    rendering = common.rendering(options, there or datetime.now().date().isoformat())
    rendering.check(tokenizer)
    count = lambda words: len(text.continue_with(tokenizer, words))  # noqa: E731
    chat = text.has_chat_template(tokenizer)
    around = len(text.encode_chat(tokenizer, "?", rendering=rendering).token_ids) - count("?") if chat else 0
    built = [catalogue.build(suite, count, around) for suite in suites]
    if there is not None and options.date is None:
        say.line("date", f"{there}, on which this run began")
    say.line("suite", f"{sum(len(suite.samples) for suite in built)} questions x {len(runs)} methods")
    protocol = _protocol(suites)
    settings_of_all = {
        "model": found.name, "tokenizer": found.tokenizer and found.tokenizer.name, "dtype": dtype,
        "date": rendering.moment.isoformat(), "chat_template_args": rendering.arguments,
        "query_aware": not options.query_agnostic, "kv_dtype": options.kv_dtype, "max_tokens": limit, "mesh": axes,
        "suites": [dataclasses.asdict(suite) for suite in suites], "protocol": protocol.name if protocol else "ours",
    }  # fmt: skip
    engine = ModelEngine(
        checkpoint.load_model(found, dtype, mesh=meshes.build(axes)), tokenizer, runs[0].method, limit,
        query_aware=not options.query_agnostic, protocol=protocol, kv_dtype=options.kv_dtype, rendering=rendering,
        published_ends=checkpoint.declared_end_tokens(found),
    )  # fmt: skip
    together = grids.together(runs, config.num_layers, bool(grid and grid.get("share_prefill")))
    _answer(options, together, built, engine, settings_of_all, share, say)
    _report(options, runs, built)
    return common.OK


def _answer(
    options: argparse.Namespace, together: list[list[grids.Run]], built, engine, settings_of_all: dict[str, Any],
    share: joining.Share | None, say,
) -> None:  # fmt: skip
    """Every run's answers, each in a folder of its own; `engine` lacks the run's method."""
    import jax

    from fastkv_jax.evals.engine import OnePass
    from fastkv_jax.evals.records import folder
    from fastkv_jax.evals.running.runner import Alone, run_together
    from fastkv_jax.evals.running.signals import deferred_signals

    samples = [sample for suite in built for sample in suite.samples]
    suite_of = {task: suite for suite in built for task in suite.metrics}
    process, processes = (share.process, share.processes) if share else (jax.process_index(), jax.process_count())

    def opened(one: grids.Run, shared: bool) -> Any:
        settings_of_run = settings_of_all | {
            "method": type(one.method).__name__, "settings": presets.settings(one.method),
            "window_at_question": one.window_at_question, "shared_prefill": shared,
        }  # fmt: skip
        return folder.opened(
            _folder(options, one), settings_of_run, process=process, processes=processes,
            overwrite=options.overwrite, take_over=options.take_over,
        )  # fmt: skip

    with deferred_signals() as stop:
        for group in together:
            for one in group:
                say.line("method", f"{one.name} -> {_folder(options, one)}")
            with ExitStack() as stack:
                outputs = [stack.enter_context(opened(one, len(group) > 1)) for one in group]
                joining.remember(options, share)
                engines = tuple(
                    dataclasses.replace(engine, method=one.method, window_at_question=one.window_at_question)
                    for one in group
                )
                summaries = run_together(
                    samples, OnePass(engines) if len(engines) > 1 else Alone(*engines), outputs,
                    score=lambda sample, answer: suite_of[sample.task].score(sample, answer),
                    batch_tokens=options.batch_tokens, max_rows=options.max_rows, save_prompts=options.save_prompts,
                    stop=stop, report=None if options.quiet else lambda line: say.line("", line),
                )  # fmt: skip
            for one, summary in zip(group, summaries, strict=True):
                if summary.failed:
                    told = f"{summary.failed} of {summary.samples} samples have an error in their record"
                    say.line("failed", f"{one.name}: {told}")


def _folder(options: argparse.Namespace, one: grids.Run) -> str:
    return f"{options.output.rstrip('/')}/{grids.slug(one.name)}"


def _date_there(options: argparse.Namespace, runs: list[grids.Run]) -> str | None:
    """The date that templates were told by the run that is resumed, if one is."""
    from fastkv_jax.evals.records import folder, records

    for one in runs:
        run = records.read_run(folder.writable(_folder(options, one)))
        if run is not None and isinstance(date := run.get("config", {}).get("date"), str):
            return date
    return None


def _protocol(suites) -> Any:
    """LongBench's, which holds for all of a run; the other suites have none."""
    from fastkv_jax.evals.protocols import PROTOCOLS

    names = {suite.protocol or "upstream" for suite in suites if suite.suite == "longbench"}
    if len(names) > 1 or (names and any(suite.suite != "longbench" for suite in suites)):
        raise FastKVConfigError("longbench's protocols hold for a whole run: give it a grid of its own")
    return PROTOCOLS[names.pop()] if names else None


def _report(options: argparse.Namespace, runs: list[grids.Run], built) -> None:
    """The table, on stdout and beside the runs; needles and, if all runs were timed alone, the frontier as pictures.

    Of several processes the last one to end does it: it finds all results.
    """
    from etils import epath

    from fastkv_jax.evals.records.folder import write_whole
    from fastkv_jax.evals.records.records import RESULTS, merged
    from fastkv_jax.evals.reports import frontier, heat_map, tables

    out = epath.Path(options.output)
    waiting = [one.name for one in runs if not (out / grids.slug(one.name) / RESULTS).exists()]
    if waiting:
        if not options.quiet:
            print(f"{', '.join(waiting)}: other processes' samples are not all answered yet", file=sys.stderr)
        return
    done, needles = [], {}
    for one in runs:
        records = merged(out / grids.slug(one.name))
        done.append(tables.Run(one.name, records))
        cells = [record for record in records if record["task"] == "needle"]
        if cells:
            needles[one.name] = cells
    rows = tables.rows_of(done, lambda records: _averages(records, built))
    for name, form in TABLES:
        write_whole(out / name, getattr(tables, form)(rows).encode())
    if not str(out).startswith("gs:"):
        if needles:
            heat_map.heat_maps(needles, Path(out) / "needles.png")
        if len(found := frontier.points(rows)) > 1:
            frontier.draw(found, Path(out) / "frontier.png")
    print(tables.as_text(rows))


def _averages(records, built) -> dict[str, Any]:
    """Each suite's, of its own records."""
    found: dict[str, Any] = {}
    for suite in built:
        mine = [record for record in records if record["task"] in suite.metrics]
        found |= suite.averages(mine) if mine else {}
    return found
