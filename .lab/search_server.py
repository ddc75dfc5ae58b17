"""A small search server for the environment "search": BM25 over a JSON-lines file, on this machine.

    python .lab/search_server.py CORPUS.jsonl             # port 8000
    python .lab/search_server.py CORPUS.jsonl --port 0    # a free port, named in the first line

A row of the file has contents; what else it has comes back with them. Answers have the form of the
two public servers' that Search-R1's code talks to, asked with scores: POST /retrieve with query (a
text) or queries (a list of texts), and perhaps topk, gives
{"result": [[{"document": row, "score": float}, ...], ...]}. The index is held in memory: fit for
some hundred thousand passages, not for Wikipedia.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import sdar
from envs import naming, require

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
            if not line.strip():
                continue
            with naming(f"{file}, line {number}: not a row with contents"):
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
            if word not in self.postings:
                continue
            found, times = map(np.array, self.postings[word])
            rarity = math.log(1 + (len(scores) - len(found) + 0.5) / (len(found) + 0.5))
            scores[found] += rarity * times / (times + self.norm[found])
        best = np.argsort(-scores, kind="stable")[:topk]
        return [{"document": self.rows[i], "score": scores[i]} for i in best if scores[i]]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        """Answer. A malformed request gets only a traceback here; the server goes on."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        queries = request.get("queries") or [request["query"]]
        topk = request.get("topk") or 3
        result = [self.server.index.find(query, topk) for query in queries]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"result": result}).encode())

    def log_message(self, *args):
        """Say nothing of a request."""


def main(argv=None):
    """Serve a file's rows on this machine alone, for ever."""
    parser = sdar.Parser(usage=__doc__)
    parser.add_argument("file", help="JSON lines with contents")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    given = parser.parse_args(argv)
    require(0 <= given.port < 2**16, f"--port {given.port}: must be from 0 to 65535")
    index = Index(given.file)
    with naming(f"--port {given.port}"):
        server = ThreadingHTTPServer(("127.0.0.1", given.port), Handler)
    with server:
        server.index = index
        print(f"search server: http://127.0.0.1:{server.server_port}/retrieve", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(sdar.run(main))
