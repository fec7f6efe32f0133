"""A program that passes for a llama-server: it knows the flags it is told to know and does to its clients what a test asks."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OLD_HELP = """usage: llama-server [options]
  -m,    --model FNAME        model path
  -c,    --ctx-size N         size of the prompt context
  -np,   --parallel N         number of parallel sequences
  -b,    --batch-size N       logical maximum batch size
  -ub,   --ubatch-size N      physical maximum batch size
  -fa,   --flash-attn         enable Flash Attention
  -ngl,  --gpu-layers, --n-gpu-layers N  number of layers to store in VRAM
  -a,    --alias STRING       set alias for model name
  --host HOST                 ip address to listen
  --port PORT                 port to listen
  --api-key-file FNAME        path to file containing API keys
  --metrics                   enable metrics
  -to,   --timeout N          server read/write timeout in seconds
"""

_PROGRAM = r"""#!{python}
import http.server, json, os, signal, socketserver, sys, threading
told = json.loads({told!r})
if "--help" in sys.argv:
    print(told["help"])
    sys.exit(0)
with open(told["seen"], "a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "environ": dict(os.environ), "pid": os.getpid()}}) + "\n")
print(told["says"], file=sys.stderr, flush=True)
if told["dies"]:
    os.kill(os.getpid(), told["dies"]) if told["dies"] > 0 else os._exit(-told["dies"])
if told["ignores_sigterm"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
moved = 0

class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        global moved
        if self.path == "/slots":
            if told["slots_silent"]:
                threading.Event().wait()
            moved += told["slots_move"]
            slot = {{"id": 0, "is_processing": True, "id_task": 1, "n_prompt_tokens_processed": 5,
                    "next_token": [{{"n_decoded": moved}}]}}
            return self.reply([slot])
        if self.path == "/props":
            return self.reply({{"total_slots": 1, "default_generation_settings": {{"n_ctx": 512}}, "model_alias": "fake"}})
        self.reply({{"status": "ok"}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        delta = {{"choices": [{{"index": 0, "finish_reason": None, "delta": {{"content": "word"}}}}]}}
        content = b"data: " + json.dumps(delta).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()
        threading.Event().wait()
    def reply(self, document):
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Page)
server.daemon_threads = True
server.serve_forever()
"""


@dataclass(frozen=True)
class FakeLlamaServer:
    """The program's file, and what its runs saw."""

    path: Path
    seen: Path

    @property
    def runs(self) -> list[dict[str, Any]]:
        """`argv`, `environ` and `pid` of each run so far."""
        if not self.seen.exists():
            return []
        return [json.loads(line) for line in self.seen.read_text().splitlines()]


def write_fake_llama_server(
    folder: Path,
    *,
    help: str = OLD_HELP,  # noqa: A002 - it is what --help prints
    says: str = "I srv main: loading model",
    dies: int = 0,
    slots_move: bool = True,
    slots_silent: bool = False,
    ignores_sigterm: bool = False,
) -> FakeLlamaServer:
    """Write the program. `dies` with this signal, or with this exit code when negative, before it serves; its one slot always
    works, and moves or not."""
    fake = FakeLlamaServer(folder / "llama-server", folder / "seen.jsonl")
    told = {
        "help": help,
        "says": says,
        "dies": dies,
        "slots_move": slots_move,
        "slots_silent": slots_silent,
        "ignores_sigterm": ignores_sigterm,
        "seen": str(fake.seen),
    }
    fake.path.write_text(_PROGRAM.format(python=sys.executable, told=json.dumps(told)))
    fake.path.chmod(0o755)
    return fake
