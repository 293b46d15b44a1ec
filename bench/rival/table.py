"""Results kept in Postgres as one would: a row of a table per row of the job, by COPY."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psycopg
from trunk import Answers, Head

TABLE = """
DROP TABLE IF EXISTS results;
CREATE TABLE results (
    row integer PRIMARY KEY,
    topic text NOT NULL, topic_score real NOT NULL,
    sentiment text NOT NULL, sentiment_score real NOT NULL,
    tone text[] NOT NULL, tone_score real[] NOT NULL,
    vector bytea NOT NULL
)
"""


def create(postgres: psycopg.Connection) -> None:
    """Make the table, empty."""
    postgres.execute(TABLE)
    postgres.commit()


def store(
    postgres: psycopg.Connection, heads: Mapping[str, Head], rows: Sequence[int], found: Answers
) -> None:
    """Add rows and commit them: from here on they survive whatever happens."""
    topics, sentiments, tones = (heads[task].labels for task in ("topic", "sentiment", "tone"))
    with postgres.cursor().copy("COPY results FROM STDIN") as copy:
        for i, row in enumerate(rows):
            given = [k for k, is_given in enumerate(found["tone"][i]) if is_given]
            copy.write_row(
                (
                    row,
                    topics[found["topic"][i]],
                    float(found["topic_score"][i]),
                    sentiments[found["sentiment"][i]],
                    float(found["sentiment_score"][i]),
                    [tones[k] for k in given],
                    [float(found["tone_score"][i, k]) for k in given],
                    found["vector"][i].tobytes(),
                )
            )
    postgres.commit()
