"""Nothing is computed twice: a job that is asked again looks up, a new task runs only its own column."""

from motet import Classify, Client, Embed, Job

TEXTS = [f"Note {number}: the committee met and agreed on the budget." for number in range(2000)]


def tell(words: str, job: Job) -> None:
    cells = job.wait().progress
    print(
        f"{words:<22} {cells.ok:,} cells, {cells.reused:,} of them found, {cells.ok - cells.reused:,} computed"
    )


with Client() as client:
    topic = {"topic": Classify("news-topics")}
    tell("first", client.submit(TEXTS, topic))
    tell("the same again", client.submit(TEXTS, topic))
    tell("with one task more", client.submit(TEXTS, {**topic, "vector": Embed("all-MiniLM-L6-v2")}))

    # A key makes submitting itself safe to repeat: after a crash, the same call finds the same job, or goes on
    # with the upload where it broke off.
    once = client.submit(TEXTS, topic, key="notes-2026-11")
    again = client.submit(TEXTS, topic, key="notes-2026-11")
    print(f"one job under one key: {once.id == again.id}")

    # And a job outlives its client: any other one picks it up by its id.
    print(f"picked up: {client.job(once.id).state}")
