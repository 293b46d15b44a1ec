"""Two heads trained on labelled rows, scored on rows that they have not seen, and asked. Start a server first: `motet up`."""

from typing import Any

from motet import Client, Labels, datasets


def labelled(rows: list[datasets.RatedText]) -> list[dict[str, Any]]:
    """Where each text is from, and how it sounds: some are between, and teach and test the other task alone."""
    return [{"text": row.text, "domain": row.domain, "sentiment": sentiment(row.mean)} for row in rows]


def sentiment(mean: float) -> str | None:
    return "positive" if mean >= 1 else "negative" if mean <= -1 else None


# Every tenth text, of all four domains; sentences of one document stay on one side.
train, test = datasets.split(datasets.vader()[::10])

with Client() as client:
    run = client.train(
        name="reviews",
        trunk="all-MiniLM-L6-v2",
        tasks={"domain": Labels("domain"), "sentiment": Labels("sentiment")},
        train=labelled(train),
        test=labelled(test),
        epochs=10,
    )
    run.watch()  # each epoch as it ends, and in the end the scores on the test rows

    # Both heads sit on one trunk, so they and every other head on it are one pass. `motet up` may register them; where
    # that takes an administrator, run.tasks() says so.
    asked = [row.text for row in test[::60]]
    job = client.submit(asked, run.tasks())
    for row in job.results():
        print(f"{row['domain']:<8} {row['sentiment']:<9} {asked[row.index][:80]}")
    print(f"\n{len(job.passes[0].tasks)} tasks in one pass of {job.passes[0].model}")
