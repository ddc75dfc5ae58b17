"""A small search server for the environment "search": BM25 over a JSON-lines file, on this machine.

    python envs.py serve CORPUS.jsonl             # port 8000
    python envs.py serve CORPUS.jsonl --port 0    # any free port; the first line printed names it

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs

K1, B = 0.9, 0.4  # BM25: how soon a repeated word stops counting, how far length is corrected for
LARGEST = 10**6  # bytes of a request
WANTED = "wanted: query (str) or queries (list of str), topk 1 to 1000, return_scores"


def words(text):
    """The words of a text, as they are indexed."""
    return re.findall(r"\w+", text.lower())


class Index:
    """BM25 over rows with contents. Of each word: the numbers of the rows that hold it, int32, and
    its weight in each, float32: NumPy arrays, sixteen bytes or so for a word of a passage."""

    def __init__(self, rows):
        self.rows = rows
        numbers, counts = {}, {}  # {word: array}
        lengths = np.zeros(len(rows), np.float32)
        for number, row in enumerate(tqdm(rows, "indexing", unit="passage", delay=2)):
            for word, n in Counter(words(row["contents"])).items():
                numbers.setdefault(word, array("i")).append(number)
                counts.setdefault(word, array("i")).append(n)
                lengths[number] += n

        norm = K1 * (1 - B + B * lengths / (lengths.mean() or 1))
        self.postings = {}
        for word in list(numbers):
            found = np.frombuffer(numbers.pop(word), np.int32)
            n = np.frombuffer(counts.pop(word), np.int32).astype(np.float32)
            self.postings[word] = found, n / (n + norm[found])

    def find(self, query, topk):
        """The best rows for a query: [(row, score)], best first."""
        scores = np.zeros(len(self.rows), np.float32)
        for word in words(query):
            if word in self.postings:
                found, weights = self.postings[word]
                rarity = math.log(1 + (len(self.rows) - len(found) + 0.5) / (len(found) + 0.5))
                scores[found] += weights * np.float32(rarity)
        best = np.argsort(-scores, kind="stable")[:topk]
        if topk < len(scores):  # sorting all of many would be the longest part
            best = np.argpartition(-scores, topk)[:topk]
            best = best[np.lexsort((best, -scores[best]))]
        return [(self.rows[row], float(scores[row])) for row in best if scores[row] > 0]


def answer(index, body):
    """What a request gets. body: bytes. Raises something if they are no request."""
    request = json.loads(body)
    queries = request.get("queries") or [request["query"]]
    topk = request.get("topk") or 3
    envs.require(type(queries) is list and topk in range(1, 1001), WANTED)

    results = []
    for query in queries:
        found = index.find(query, topk)
        if request.get("return_scores"):
            results.append([{"document": row, "score": score} for row, score in found])
        else:
            results.append([row for row, _ in found])
    return {"result": results}


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds in which a request must have come

    def do_POST(self):
        """Answer, or say what a request should hold (422)."""
        try:
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(max(0, min(length, LARGEST)))
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


def serve(file, port=8000):
    """Serve a JSON-lines file of rows (id, contents) on loopback for ever. EnvUnavailable for
    another file; OSError for a port that is taken."""
    envs.require(0 <= port < 2**16, f"--port {port}: must be from 0 to 65535")
    index = Index(envs.read_rows(file, id=(str, int), contents=(str,)))
    with Server(("127.0.0.1", port), Handler) as server:
        server.index = index
        print(f"search server: http://127.0.0.1:{server.server_port}/retrieve", flush=True)
        server.serve_forever()


def main(argv):
    """`python envs.py serve` with these arguments. Returns its exit code."""
    return envs.main(["serve", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
