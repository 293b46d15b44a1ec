"""A batch file by OpenAI's own client: many requests in one file, run as one durable job, every line accounted for.

Set the address and the key with  eval "$(motet token create notebook --openai)"  and name a model of yours in MODEL.
"""

import json
import os
import time

from openai import OpenAI

MODEL = os.environ.get("MODEL", "smollm2-135m")
TICKETS = [f"Ticket {number}: my card was charged {number + 1} times." for number in range(8)]
QUESTIONS = ("What is this about?", "How many times was the card charged?", "Write a title.")

lines = [
    {
        "custom_id": f"ticket-{ticket}-{question}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{TICKETS[ticket]}\n\n{asked}"}],
            "temperature": 0,
            # Each line may say other options; they share one pass over the model all the same.
            "max_tokens": 8 + 4 * question,
        },
    }
    for ticket in range(len(TICKETS))
    for question, asked in enumerate(QUESTIONS)
]

with OpenAI() as client:
    body = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("tickets.jsonl", body), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="2h",
        metadata={"what": "tickets"},
    )
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    print(f"{batch.status}: {batch.request_counts}")
    assert batch.output_file_id is not None
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).read().splitlines()]
    by_id = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    for name in ("ticket-0-0", "ticket-0-2"):
        print(f"{name}: {by_id[name]['choices'][0]['message']['content']!r}")
    print(f"{len(by_id)} of {len(lines)} lines answered, each once")
