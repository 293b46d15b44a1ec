"""Several prompts about one text share its prefill, and a reply waits for the sentiment that it names.

Start a server and register a model first: `motet up`, and in another shell `motet models add --smollm2`. That one is
small enough for any machine and not to be trusted; name your own behind this command.
"""

import sys

from motet import Choose, Client, Generate

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
TICKETS = [
    {"name": "Ann", "text": "The kettle arrived broken, and nobody answers my mails. I want my money back."},
    {"name": "Ben", "text": "Wonderful kettle, it boils in a minute. Can I get the same one in blue?"},
]
TASKS = {
    # Nothing is written for this one: the likeliest label is chosen, right behind the text that all of them share.
    "sentiment": Choose(
        MODEL, labels=("angry", "content", "delighted"), question="How does the customer feel?"
    ),
    "summary": Generate(MODEL, prompt="Summarise the message in one short sentence.", max_tokens=40),
    "french": Generate(MODEL, prompt="Translate the message into French.", max_tokens=60),
    # {name} is a field of the row, {sentiment} the answer above: row by row, the reply begins when that is there.
    "reply": Generate(
        MODEL,
        prompt="The customer is {sentiment}. Write a short reply that begins with: Dear {name},",
        temperature=0.7,
        seed=1,
        max_tokens=60,
    ),
}

with Client() as client:
    plan = client.plan(TICKETS, TASKS)
    for planned in plan.passes:
        behind = f", behind {' and '.join(planned.needs)}" if planned.needs else ""
        print(f"{', '.join(planned.tasks)}: one pass{behind}, {planned.saved:.0%} of its tokens saved")

    job = client.submit(TICKETS, TASKS, name="replies")
    for row in job.results():
        print(f"\n{TICKETS[row.index]['name']} is {row['sentiment']} ({row['sentiment'].score:.2f})")
        for task in ("summary", "french", "reply"):
            cut = " … (max_tokens reached)" if row[task].finish == "length" else ""
            print(f"  {task:<8} {row[task]}{cut}")
        for task, error in row.errors.items():
            print(f"  {task:<8} has no answer: {error.error}: {error.message}")
