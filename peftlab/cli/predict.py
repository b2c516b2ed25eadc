"""``peftlab predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from peftlab import formatting
from peftlab.cli.answers import answer_line, has_no_result, whole_answer
from peftlab.cli.failures import usage_error
from peftlab.cli.options import Debug, Json, RecipeOption, Replace, Target, Temperature, TopP, split_overrides
from peftlab.cli.output import Output, output_of
from peftlab.cli.prediction_files import PredictionFile, check_destination, check_folder
from peftlab.errors import DataError


def predict(
    context: typer.Context,
    target: Target,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts, or - for stdin, one per line; settings may be mixed in."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", metavar="F", help="Input file (csv, jsonl, txt, ...) with the recipe's columns."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="F", help="Write the predictions to F, .jsonl or .csv.")
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option("--picture", metavar="FILE", help="Draw the objects found in the (first) image: .png or .svg."),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option("--masks", metavar="FOLDER", help="Write the class of each pixel of the images as PNG files."),
    ] = None,
    recipe: RecipeOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Maximum answer length in tokens.")
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    beams: Annotated[
        int | None, typer.Option("--beams", metavar="N", min=1, help="Width of the beam search (seq2seq).")
    ] = None,
    replace: Replace = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    overrides, given = split_overrides(texts)
    inputs = _inputs(given, file, context)
    destination = check_destination(output, replace=replace) if output else None
    if masks is not None:
        check_folder(masks, replace=replace)
    with out.working():
        import peftlab

        results = peftlab.predict(
            target,
            Path(file) if file else inputs or [],
            recipe=recipe,
            overrides=overrides,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            beams=beams,
            picture=picture,
            masks=masks,
            columns=file is not None and (destination is not None or out.json),
        )
    records = _records(results, inputs, out)
    if destination is not None:
        _write(records, destination, target, out)
    elif out.json:
        out.document({"target": target, "predictions": list(records)})
    else:
        _print(records, out, single=inputs is not None and len(inputs) == 1 and given != ["-"] and bool(given))


def _inputs(given: list[str], file: str | None, context: typer.Context) -> list[str] | None:
    """The texts; None if --file is given."""
    if file is not None:
        if given:
            usage_error(f"give texts or --file, not both: found {given[0]!r} and --file {file}", context)
        return None
    if given and given != ["-"]:
        if "-" in given:
            usage_error("- means standard input and cannot be combined with texts", context)
        return given
    if not given and (sys.stdin is None or sys.stdin.isatty()):
        usage_error("nothing to predict: give a TEXT, --file F, or pipe in one text per line", context)
    return _read_stdin()


def _read_stdin() -> list[str]:
    """The lines of standard input, without blank lines."""
    try:
        raw = getattr(sys.stdin, "buffer", None)
        text = raw.read().decode("utf-8-sig") if raw is not None else sys.stdin.read()
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise DataError(f"standard input, line {line}: not UTF-8 text; convert it first") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DataError("standard input is empty; expected one text per line")
    blank = len(lines) - len(texts) - (lines[-1] == "")
    if blank:
        sys.stderr.write(f"skipped {blank:,} blank line{'' if blank == 1 else 's'} of standard input\n")
    return texts


def _records(results: Iterable[dict[str, Any]], inputs: list[str] | None, out: Output) -> Iterator[dict[str, Any]]:
    """Yields the results, each with its input, or with its row number in the file."""
    stream = iter(results)
    index = 0
    while True:
        with out.working():  # results are computed lazily, here
            result = next(stream, None)
        if result is None:
            return
        head = {"row": index + 1} if inputs is None else {"input": inputs[index]}
        yield head | {name: value for name, value in result.items() if name not in head}
        index += 1


def _print(records: Iterable[dict[str, Any]], out: Output, *, single: bool) -> None:
    """Prints only the answer for one text, else a line per record; tab-separated if stdout is not a terminal."""
    for record in records:
        if has_no_result(record):
            out.line()  # as many lines as inputs
        elif single:
            out.line(whole_answer(record, styled=out.styled))
        else:
            out.line(answer_line(record, styled=out.styled, width=out.console.width))


def _write(records: Iterable[dict[str, Any]], destination: Path, target: str, out: Output) -> None:
    counts: dict[str, int] = {}
    with PredictionFile(destination) as file:
        for record in records:
            file.add(record)
            if record.get("label") is not None:
                counts[record["label"]] = counts.get(record["label"], 0) + 1
    if out.json:
        document = {"target": target, "output": str(destination), "rows": file.num_rows}
        out.document(document | ({"labels": counts} if counts else {}))
        return
    out.line(f"{file.num_rows:,} predictions in {destination}")
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    for line in formatting.joined([f"{formatting.one_line(k)} {n:,}" for k, n in ranked], width=out.console.width):
        out.line(line, style="dim")
