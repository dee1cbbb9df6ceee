"""`make run` and `make app`.

Execute the notebook into a folder under runs/ and serve the Space that came out of it.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from training.console import forgive_output

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = "ERA_S12_Assignment.ipynb"
HOST, PORT = "127.0.0.1", os.environ.get("GRADIO_SERVER_PORT") or "7860"
# What is written over: the start of a line up to a carriage return, and what follows one and may
# still be.
TRANSIENT = re.compile(r"(?:\r[^\r\n]*)+\Z|[^\r\n]*\r(?!\n)")


class TalkingClient(NotebookClient):
    """Executes a notebook and shows on the terminal what its cells print, while they print it."""

    exit_code = (
        None  # of a kernel that died by itself: below 0 the number of the signal that killed it
    )
    tidying = False  # nbclient ends the kernel: at the end, or after Ctrl-C

    def process_message(self, message: dict, cell: nbformat.NotebookNode, index: int) -> object:
        if message["msg_type"] == "stream":
            text = message["content"]["text"]
            print(text if sys.stdout.isatty() else TRANSIENT.sub("", text), end="", flush=True)
        return super().process_message(message, cell, index)

    async def _async_check_alive(self) -> None:
        try:
            await super()._async_check_alive()
        except DeadKernelError:
            if not self.tidying:
                self.exit_code = await self.km.provisioner.poll()
            raise

    async def _async_cleanup_kernel(self) -> None:
        self.tidying = True
        await super()._async_cleanup_kernel()


class KernelDied(RuntimeError):
    """The kernel ended in the middle of a cell; the message says of what."""


def cause_of_death(exit_code: int) -> str:
    """Say what ended a kernel, where its exit code tells it."""
    if exit_code in (-9, 137):  # SIGKILL, as Python and as a shell tell it
        return (
            "it was killed (SIGKILL), most likely because the memory ran out. Close what else uses it, or set"
            " ERA_BATCH_SIZE or ERA_ARCH to something smaller"
        )
    if exit_code < 0:
        return f"it was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return f"its exit code is {exit_code}"


def execute(out: Path) -> None:
    """Run all cells in the project folder.

    Keep the executed copy in `out`, also when a cell fails.
    """
    notebook = nbformat.read(PROJECT / NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    client = TalkingClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(PROJECT)}},
        on_cell_start=lambda cell, cell_index: announce(notebook, cells, cell, cell_index),
    )
    # ipykernel shows figures as pictures, unless this names something else.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    try:
        client.execute(env=environment)
    except DeadKernelError as error:
        if client.exit_code is None:
            raise
        raise KernelDied(cause_of_death(client.exit_code)) from error
    finally:
        notebook.metadata.pop(
            "widgets", None
        )  # GitHub may refuse a notebook that holds the state of widgets
        nbformat.write(notebook, out / NOTEBOOK)


def announce(
    notebook: nbformat.NotebookNode, cells: list, cell: nbformat.NotebookNode, index: int
) -> None:
    """Print the heading that a code cell stands under when the section begins."""
    before = notebook.cells[index - 1] if index else cell
    if cell.cell_type == "code" and before.source.startswith("## "):
        print(
            f"\n[cell {cells.index(cell) + 1} of {len(cells)}] {before.source.splitlines()[0][3:]}",
            flush=True,
        )


def port_is_free() -> bool:
    """Whether a server could listen on HOST and PORT."""
    with socket.socket() as probe:
        if os.name != "nt":  # on Windows it would allow to bind a port that is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(PORT)))
        except OSError:
            return False
    return True


def serve(space: Path) -> int:
    """Serve a Space until it is interrupted; says when it answers."""
    environment = os.environ | {"GRADIO_SERVER_NAME": HOST, "GRADIO_SERVER_PORT": str(PORT)}
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while app.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((HOST, int(PORT))) == 0:
                    print(
                        f"\nThe app of {space} answers on http://{HOST}:{PORT} (stop it with Ctrl-C)",
                        flush=True,
                    )
                    break
            time.sleep(0.3)
        return app.wait()
    except KeyboardInterrupt:
        app.terminate()
        app.wait(10)
        return 0


def results(folder: Path) -> dict:
    """results.json of a run, or an empty dict."""
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run() -> int:
    """Execute, then serve: the run's own Space if it was on CIFAR-10, else the committed one."""
    forgive_output()  # cells print what a terminal may not be able to show
    if not port_is_free():
        print(
            f"Port {PORT} is in use. Stop what uses it, or set GRADIO_SERVER_PORT to another one."
        )
        return 1
    out = PROJECT / "runs" / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    os.environ["ERA_OUT_DIR"] = str(out.relative_to(PROJECT))  # relative: the notebook prints it
    print(f"Executing {NOTEBOOK}; everything it writes goes to {out}", flush=True)
    try:
        execute(out)
    except CellExecutionError as error:
        print(f"\nA cell failed:\n{error}\nThe notebook up to there is {out / NOTEBOOK}")
        return 1
    except KernelDied as error:
        print(f"\nThe notebook's kernel died: {error}.")
        print(f"Run again to continue the training. The notebook up to there is {out / NOTEBOOK}")
        return 1
    except (
        KeyboardInterrupt,
        DeadKernelError,
        AssertionError,
    ):  # nbclient answers Ctrl-C with any of them
        print(
            f"\nStopped. Run again to continue the training. The notebook up to there is {out / NOTEBOOK}"
        )
        return 130
    print(f"\nThe executed notebook is {out / NOTEBOOK}")
    if results(out).get("data") == "CIFAR-10":
        return serve(out / "space")
    print("This run was on the built-in sample, so the Space that is served is the committed one.")
    return serve(PROJECT / "space")


def main() -> int:
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "app"])
    command = parser.parse_args().command
    if not PORT.isdecimal() or int(PORT) > 65535:
        parser.error(f"GRADIO_SERVER_PORT: expected a number from 0 to 65535, got {PORT!r:.60}")
    return run() if command == "run" else serve(PROJECT / "space")


if __name__ == "__main__":
    sys.exit(main())
