"""All settings in the shape of the slides' table."""

from pathlib import Path

import typer

from stages import files, params, tables
from stages.command import console, one_sentence

app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main() -> None:
    """Write reports/leaderboard.md and plots/leaderboard.csv from every metric there is."""
    file = params.read()
    settings = [key[1:] for key in file.tasks.settings]
    metrics = {setting: tables.metrics(file, setting) for setting in settings}
    names = [name for name in file.algorithms if any(name in metrics[setting] for setting in settings)]
    known = tables.published()
    titles = [f"{shape.way}-way {shape.shot}-shot" for shape in (params.setting(file, s) for s in settings)]
    text = ["# Leaderboard", "Accuracy in %, 95 % interval over test tasks."]
    for kind, half in (("accuracy", "ci95"), ("inductive", "inductive_ci95")):
        rows = []
        for name in names:
            cells = [metrics[s].get(name) for s in settings]
            rows.append([name, *(tables.percent(c[kind], c[half]) if c else "-" for c in cells)])
            if kind == "accuracy" and any((name, s) in known for s in settings):
                theirs = [known.get((name, s)) for s in settings]
                rows.append([f"{name}, published", *(tables.published_text(*t) if t else "-" for t in theirs)])
        text += [
            "## Transductive" if kind == "accuracy" else "## Inductive",
            tables.markdown(["algorithm", *titles], rows),
        ]
    lines = [
        f"- {title}: {tables.provenance(list(metrics[s].values()))}"
        for s, title in zip(settings, titles, strict=True)
        if metrics[s]
    ]
    text += ["## What each column is of", "\n".join(lines)]
    text.append(
        "Published: transductive, on test tasks of their own; the table of the slides and, where it has no row, the papers: "
        "MAML++ (Antoniou et al. 2019, an ensemble), ANIL (Raghu et al. 2020). 600 test tasks and as "
        "many query images per class as shots; Reptile: 10,000 and one."
    )
    with files.whole(Path("reports/leaderboard.md")) as beside:
        beside.write_text("\n\n".join(text) + "\n")
    with files.whole(Path("plots/leaderboard.csv")) as beside:
        found = [(s, n, metrics[s][n]) for s in settings for n in names if n in metrics[s]]
        lines = [f"{s},{n},{m['accuracy']},{m['ci95']},{m['inductive']},{m['budget']},{m['data']}" for s, n, m in found]
        beside.write_text("\n".join(["setting,algorithm,accuracy,ci95,inductive,budget,data", *lines]) + "\n")
    console.print(f"reports/leaderboard.md: {len(names)} algorithms in {len(settings)} settings")


if __name__ == "__main__":
    app()
