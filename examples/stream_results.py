"""Rows as they are finished, while the job still runs: from a source that never fits in memory."""

from collections import Counter
from collections.abc import Iterator

from motet import Classify, Client


def tickets() -> Iterator[dict[str, str]]:
    """Stands for a database cursor: it is read once, and never held as a whole."""
    for number in range(5000):
        yield {
            "id": f"T{number}",
            "text": f"Ticket {number}: the match was delayed, and I want my money back.",
        }


with Client() as client:
    # A row that is no row becomes an error cell instead of a refusal of all the others.
    job = client.submit(tickets(), {"topic": Classify("news-topics")}, bad_rows="error")
    topics: Counter[str] = Counter()
    for row in job.results(order="done"):
        topics[str(row["topic"])] += 1
        if sum(topics.values()) % 1000 == 0:
            print(f"{sum(topics.values()):,} rows so far, the last one is row {row.index:,}")

    print(topics.most_common(3))
    for cell in job.errors():
        print(f"row {cell.row}, {cell.task}: {cell.error}: {cell.message}")
