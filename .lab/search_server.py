"""A small search server for the environment "search": BM25 over a JSON-lines file, on this machine.

    python .lab/search_server.py CORPUS.jsonl             # port 8000
    python .lab/search_server.py CORPUS.jsonl --port 0    # a free port, named in the first line

A row of the file has an id and contents. The answers are those of the two public servers that
Search-R1's code talks to: POST /retrieve with query or queries, topk and return_scores gives
{"result": [[row, ...]]}, or with scores {"result": [[{"document": row, "score": float}, ...]]}.
The index is held in memory: fit for some hundred thousand passages, not for Wikipedia.
"""

import json
import math
import re
import sys
from array import array
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar
from envs import UserError, naming, require

K1, B = 0.9, 0.4  # BM25: how soon a repeated word stops counting, how far length is corrected for
WANTED = "wanted: query (str) or queries (list of str), topk 1 to 1000, return_scores"


def words(text):
    """The words of a text, as they are indexed."""
    return re.findall(r"\w+", text.lower())


class Index:
    """BM25 over rows with contents. Of each word: the numbers of the rows that hold it, and how
    often each does: arrays, eight bytes for a word of a passage."""

    def __init__(self, file):
        """UserError for a line that is no such row."""
        self.rows, self.postings, lengths = [], {}, []
        lines = Path(file).read_bytes().splitlines()
        for number, line in enumerate(tqdm(lines, "indexing", unit="passage", delay=2)):
            with naming(f"{file}, line {number + 1}: not a row with id and contents", UserError):
                row = json.loads(line)
                counts = Counter(words(row["contents"]))
            self.rows.append(row)
            lengths.append(counts.total())
            for word, n in counts.items():
                found, times = self.postings.setdefault(word, (array("i"), array("i")))
                found.append(number)
                times.append(n)
        require(self.rows, f"{file} is empty")
        self.norm = K1 * (1 - B + B * np.array(lengths) / np.mean(lengths))

    def find(self, query, topk):
        """The best rows for a query: [{"document": row, "score": float}], best first."""
        scores = np.zeros(len(self.rows))
        for word in filter(self.postings.get, words(query)):
            found, times = map(np.array, self.postings[word])
            rarity = math.log(1 + (len(scores) - len(found) + 0.5) / (len(found) + 0.5))
            scores[found] += rarity * times / (times + self.norm[found])
        hits = np.flatnonzero(scores)
        best = hits[np.argsort(-scores[hits], kind="stable")[:topk]]
        return [{"document": self.rows[row], "score": float(scores[row])} for row in best]


def answer(index, body):
    """What a request gets. body: bytes. Raises something if they are no request."""
    request = json.loads(body)
    queries = request.get("queries") or [request["query"]]
    topk = request.get("topk") or 3
    require(type(queries) is list and topk in range(1, 1001), WANTED)

    results = [index.find(query, topk) for query in queries]
    if not request.get("return_scores"):
        results = [[row["document"] for row in found] for found in results]
    return {"result": results}


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds in which a request must have come

    def do_POST(self):
        """Answer, or say what a request should hold (422)."""
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            code, value = 200, answer(self.server.index, body)
        except Exception:  # whatever is wrong with a request, the next one is served
            code, value = 422, {"detail": WANTED}
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
        """Say nothing of a request."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of connections that wait: a step's searches come all at once

    def handle_error(self, request, client_address):
        """A client went away: nothing to say."""


def main(argv):
    """Serve a file's rows on this machine alone, for ever."""
    parser = sdar.Parser("python .lab/search_server.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="JSON lines with id and contents")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    given = parser.parse_args(argv)
    require(0 <= given.port < 2**16, f"--port {given.port}: must be from 0 to 65535")
    index = Index(given.file)
    with Server(("127.0.0.1", given.port), Handler) as server:
        server.index = index
        print(f"search server: http://127.0.0.1:{server.server_port}/retrieve", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(sdar.run(partial(main, sys.argv[1:])))
