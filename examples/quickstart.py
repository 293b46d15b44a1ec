"""Four questions of every text, one model pass, one merged row each. Start a server first: `motet up`."""

from motet import Classify, Client, Embed

TEXTS = [
    "Shares rose after the central bank held interest rates.",
    "The cup final went to extra time before a late winner.",
    "The new phone is thinner, faster and far too expensive.",
    "A dull film that wastes a wonderful cast.",
]

with Client() as client:
    job = client.submit(
        TEXTS,
        tasks={
            "topic": Classify("news-topics"),
            "sentiment": Classify("review-sentiment"),
            "tone": Classify("tone"),
            "vector": Embed("all-MiniLM-L6-v2", dtype="fp16"),
        },
    )
    for row in job.results():
        print(f"{row['topic']:<14} {row['sentiment']:<9} {row['tone']:<20} {TEXTS[row.index]}")

    fused = ", ".join(f"{len(p.tasks)} tasks in one pass of {p.model}" for p in job.passes)
    print(f"\n{fused}: {job.usage['tokens']} tokens read")
