"""A small search server for the environment "search": BM25 over a JSON-lines file, on this machine.

    python .lab/search_server.py CORPUS.jsonl             # port 8000
    python .lab/search_server.py CORPUS.jsonl --port 0    # a free port, named in the first line

A row of the file has an id and contents. The answers are those of the two public servers that
Search-R1's code talks to, asked with scores: POST /retrieve with query (a text) or queries (a list
of texts), and perhaps topk, gives {"result": [[{"document": row, "score": float}, ...], ...]}.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdar
from envs import UserError, naming, require

K1, B = 0.9, 0.4  # BM25: how soon a repeated word stops counting, how far length is corrected for


def words(text):
    """The words of a text, as they are indexed."""
    return re.findall(r"\w+", text.lower())


class Index:
    """BM25 over rows with contents. Of each word: the numbers of the rows that hold it, and how
    often each does: arrays, eight bytes for a word of a passage."""

    def __init__(self, file):
        """UserError for a line that is no such row."""
        self.rows, self.postings, lengths = [], {}, []
        for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
            with naming(f"{file}, line {number}: not a row with id and contents", UserError):
                row = json.loads(line)
                counts = Counter(words(row["contents"]))
            for word, n in counts.items():
                found, times = self.postings.setdefault(word, (array("i"), array("i")))
                found.append(len(self.rows))
                times.append(n)
            self.rows.append(row)
            lengths.append(counts.total())
        require(self.rows, f"{file} is empty")
        self.norm = K1 * (1 - B + B * np.array(lengths) / np.mean(lengths))

    def find(self, query, topk):
        """The best rows for a query: [{"document": row, "score": float}], best first."""
        scores = np.zeros(len(self.rows))
        for word in words(query):
            found, times = map(np.array, self.postings.get(word, ([], [])))
            found = found.astype(int)
            rarity = math.log(1 + (len(scores) - len(found) + 0.5) / (len(found) + 0.5))
            scores[found] += rarity * times / (times + self.norm[found])
        best = np.argsort(-scores, kind="stable")[:topk]
        return [{"document": self.rows[i], "score": scores[i]} for i in best if scores[i]]


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds in which a request must have come

    def do_POST(self):
        """Answer, or say that it is no such request (422)."""
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            queries, topk = request.get("queries") or [request["query"]], request.get("topk", 3)
            code, value = 200, {"result": [self.server.index.find(text, topk) for text in queries]}
        except Exception as error:  # whatever is wrong with a request, the next one is served
            code, value = 422, {"detail": f"no query or queries, topk: {error!r:.100}"}
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
        """Say nothing of a request."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of connections that wait: a step's searches come all at once


def main(argv):
    """Serve a file's rows on this machine alone, for ever."""
    parser = sdar.Parser("python .lab/search_server.py", description=__doc__)
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
    sys.exit(sdar.run(lambda: main(sys.argv[1:])))
