"""One open job, many callers: each row is answered at once, and is as durable as the rows of any other job."""

from concurrent.futures import ThreadPoolExecutor

from motet import Classify, Client

TICKETS = [f"Ticket {number}: the match was delayed, and I want my money back." for number in range(50)]

with Client() as client, client.open({"topic": Classify("news-topics")}, name="example-desk") as feed:
    row = feed.ask({"text": "The cup final went to extra time."}, within_s=60)
    print(f"row {row.index} is about {row['topic']}")

    # Threads share requests. A key names a row for ever: asked again, whoever died in between, it is the same row.
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(lambda n: feed.ask(TICKETS[n], key=f"ticket-{n}", within_s=60), range(50)))
    again = feed.ask(TICKETS[7], key="ticket-7")
    print(
        f"{len(rows)} tickets answered; ticket 7 is row {again.index} both times: {again.index == rows[7].index}"
    )

    # Every row that anybody asked, as it is done; the cursor of the last one takes it up later, elsewhere.
    for row in feed.rows():
        if row.index == 9:
            break
    print(
        f"goes on behind row {row.index} with after={row.cursor}: {next(feed.rows(after=row.cursor)).index}"
    )

    # Leaving would keep it open for others. Closing ends it; removing frees its name.
    job = feed.close().wait()
    print(f"{job.state}: {job.rows} rows")
    job.delete()
