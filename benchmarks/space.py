"""How the Space holds up: `python -m benchmarks.space`, about five minutes on two cores.

Starts the committed Space and measures: the time to its first answer; one Grad-CAM map for 1, 5 and
20 visitors at once; a change of opacity; 500 mixed requests of 50 visitors within a minute, each
answer compared with the one given alone; and its memory after 200 and after 2,000 requests. Writes
benchmarks/results/space.json. `--quick` is a trial, printed only.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.accuracy import RESULTS
from training.files import write_json
from training.hardware import hardware, versions

SPACE = Path(__file__).resolve().parent.parent / "space"
ANY = "any class"
STAGES = [stage["name"] for stage in json.loads((SPACE / "model.json").read_text())["stages"]]


class Visitor:
    """One client of the Space, by plain HTTP, as anyone could write it."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=f"{address}/gradio_api", timeout=300)

    def upload(self, path: Path) -> dict:
        """Upload a picture; return what an endpoint takes for it."""
        with path.open("rb") as file:
            sent = self.http.post("/upload", files={"files": file}).json()[0]
        return {"path": sent, "meta": {"_type": "gradio.FileData"}}

    def ask(self, endpoint: str, *data: object) -> tuple[str, object]:
        """('complete' or 'error', what came back)."""
        event = self.http.post(f"/call/{endpoint}", json={"data": data}).json()["event_id"]
        with self.http.stream("GET", f"/call/{endpoint}/{event}") as answer:
            lines = [line for line in answer.iter_lines() if line.startswith(("event: ", "data: "))]
        *_, kind, content = [
            line for line in lines if line != "event: heartbeat" and line != "data: null"
        ] or ["", ""]
        return kind.removeprefix("event: "), json.loads(content.removeprefix("data: ") or "null")

    def fingerprint(self, answer: object) -> object:
        """An answer with a digest of its pixels in the place of each picture.

        What two equal answers share.
        """
        if isinstance(answer, dict) and answer.get("path"):
            pixels = Image.open(
                io.BytesIO(self.http.get(f"/file={answer['path']}").content)
            ).tobytes()
            return hashlib.sha256(pixels).hexdigest()
        if isinstance(answer, dict):
            return {key: self.fingerprint(value) for key, value in answer.items()}
        return (
            [self.fingerprint(value) for value in answer]
            if isinstance(answer, list | tuple)
            else answer
        )


@contextlib.contextmanager
def serve(space: Path, uploads: str):
    """`python app.py` on a free port of 127.0.0.1.

    Yields its address, its process and when it was started.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": uploads}
    start = time.perf_counter()
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/config").raise_for_status()
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}", app, start
    finally:
        app.terminate()
        app.wait(30)


def memory(app: subprocess.Popen, key: str) -> float:
    """Memory of a process in MB. key: 'VmRSS', now, or 'VmHWM', the most it ever had."""
    status = Path(f"/proc/{app.pid}/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)}


def mixed_requests(visitor: Visitor) -> list[tuple]:
    """Forty different requests: every endpoint, stage and method, some that are refused."""
    pictures = [visitor.upload(path) for path in sorted((SPACE / "examples").glob("*.png"))]
    methods = ("GradCAM", "GradCAM++", "LayerCAM")
    return [
        *(("classify", picture, count) for count, picture in enumerate(pictures, 1)),
        *(
            ("explain", p, True, 1 + i % 4, STAGES[i % 4], methods[i % 3], 0.4)
            for i, p in enumerate(pictures)
        ),
        *(
            ("misclassified", True, 1 + i, ANY, ANY, i % 2 == 0, STAGES[i % 4], methods[i % 3], 0.5)
            for i in range(10)
        ),
        *(("classify", picture, 50) for picture in pictures[:5]),
        *(("explain", picture, True, 2, "layer99", "GradCAM", 0.4) for picture in pictures[:5]),
    ]


def measure_explain(address: str, requests: int) -> dict[str, dict]:
    """explain_ms[visitors].

    Percentiles of the time for one Grad-CAM map, with so many visitors at once.
    """
    found = {}
    for count in (1, 5, 20):
        visitors = [Visitor(address) for _ in range(count)]
        pictures = [visitor.upload(SPACE / "examples/cat.png") for visitor in visitors]

        def one(index: int, visitors=visitors, pictures=pictures) -> list[float]:
            seconds = []
            for _ in range(max(2, requests // len(visitors))):
                start = time.perf_counter()
                kind, _ = visitors[index].ask(
                    "explain", pictures[index], True, 1, STAGES[-1], "GradCAM", 0.4
                )
                assert kind == "complete"
                seconds.append(time.perf_counter() - start)
            return seconds

        with ThreadPoolExecutor(count) as pool:
            found[str(count)] = percentiles(list(itertools.chain(*pool.map(one, range(count)))))
        print(f"explain, {count} visitors: {found[str(count)]}", flush=True)
    return found


def measure_opacity(address: str, moves: int) -> float:
    """Median milliseconds of a move of the opacity slider, by the page's own protocol."""
    http, session = httpx.Client(base_url=f"{address}/gradio_api", timeout=60), "benchmark"
    config = httpx.get(f"{address}/config").json()
    explain = next(event for event in config["dependencies"] if event.get("api_name") == "explain")
    opacity = explain["inputs"][-1]
    recolor = next(
        event
        for event in config["dependencies"]
        if [opacity, "input"] in map(list, event["targets"])
    )

    def run(event: dict, data: list) -> float:
        start = time.perf_counter()
        http.post(
            "/queue/join", json={"data": data, "fn_index": event["id"], "session_hash": session}
        )
        with http.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = (
                    json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                )
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return time.perf_counter() - start
        raise AssertionError("the stream ended")

    picture = Visitor(address).upload(SPACE / "examples/cat.png")
    run(explain, [picture, True, 2, STAGES[-1], "GradCAM", 0.4])
    seconds = [
        run(recolor, [None, picture, True, 2, STAGES[-1], "GradCAM", i / moves])
        for i in range(moves)
    ]
    return round(1000 * statistics.median(seconds), 1)


def measure_load(address: str, visitors: int, requests: int, seconds: float) -> dict[str, float]:
    """Send mixed requests of many visitors, spread over some seconds.

    Each answer is compared with the one given alone: to the last bit, by one process with one
    number of threads.

    Returns:
        How many requests there were, how many answers were wrong, how many failed, the seconds.
    """
    first = Visitor(address)
    wanted = mixed_requests(first)
    alone = [
        (kind, first.fingerprint(answer))
        for kind, answer in (first.ask(*request) for request in wanted)
    ]

    def one(number: int) -> tuple[int, int]:
        visitor, wrong, failed = Visitor(address), 0, 0
        each = requests // visitors
        for turn in range(each):
            due = start + seconds * (turn + number / visitors) / each
            time.sleep(max(0.0, due - time.perf_counter()))
            index = (7 * number + turn) % len(wanted)
            try:
                kind, answer = visitor.ask(*wanted[index])
                wrong += (kind, visitor.fingerprint(answer)) != alone[index]
            except Exception as problem:  # whatever went wrong, the visitor had no answer
                print(f"failed: {problem!r:.200}", flush=True)
                failed += 1
        return wrong, failed

    start = time.perf_counter()
    with ThreadPoolExecutor(visitors) as pool:
        wrong, failed = (
            sum(column) for column in zip(*pool.map(one, range(visitors)), strict=True)
        )
    return {
        "requests": requests,
        "wrong": wrong,
        "failed": failed,
        "load_s": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Measure all of it and write benchmarks/results/space.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as uploads, serve(SPACE, uploads) as (address, app, start):
        visitor = Visitor(address)
        assert (
            visitor.ask("classify", visitor.upload(SPACE / "examples/cat.png"), 3)[0] == "complete"
        )
        found: dict[str, object] = {"cold_start_s": round(time.perf_counter() - start, 2)}
        print(found, flush=True)
        found["explain_ms"] = measure_explain(address, 20 if quick else 100)
        found["opacity_ms"] = measure_opacity(address, 10 if quick else 100)
        found |= measure_load(address, 50, 100 if quick else 500, 12 if quick else 60)
        # Memory: the measurements before have warmed everything up.
        few, many = (40, 80) if quick else (200, 1800)
        measure_load(address, 20, few, 0)
        before = memory(app, "VmRSS")
        more = measure_load(address, 20, many, 0)
        found |= {f"memory_{key}": more[key] for key in ("wrong", "failed")}
        found |= {
            "memory_growth": round(memory(app, "VmRSS") / before - 1, 3),
            "rss_mb": round(memory(app, "VmRSS")),
        }
        found["peak_rss_mb"] = round(memory(app, "VmHWM"))
    found |= {"machine": hardware(), "versions": versions()}
    print(json.dumps(found, indent=1))
    if not quick:
        write_json(RESULTS / "space.json", found)


if __name__ == "__main__":
    main()
