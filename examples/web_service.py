"""A web service around an exported model, without torch in the process: pip install numpy starlette uvicorn

    lcnn-compile export … --native served
    python examples/web_service.py served                # POST /run: float32 bytes of any number of images in, of their outputs out
    python examples/web_service.py served --measure 4    # requests per second by so many clients, and the memory of the server
    python examples/web_service.py model.onnx --measure 4          # the same with ONNX Runtime: pip install onnxruntime

A call releases Python's lock and works in memory of its own, so that requests run side by side on one model.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def open_model(path: Path, threads: int) -> tuple[tuple[int, ...], Callable[[Any], Any]]:
    """The sizes of one image, and what makes an output [N, *] of images [N, *sizes]."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0]
        return tuple(given.shape[1:]), lambda x: session.run(None, {given.name: x})[0]
    sys.path.insert(0, str(path))
    from lcnn_native import Model

    model = Model(path / "model.lcnn", threads)
    return tuple(size or 0 for size in model.inputs[0].shape[1:]), lambda x: model(x)[0]


def application(path: Path, threads: int) -> Any:
    """The service."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    sizes, run = open_model(path, threads)
    image = 4 * int(np.prod(sizes))

    async def answer(request: Request) -> Response:
        body = await request.body()
        if not body or len(body) % image:
            return JSONResponse({"error": f"{len(body)} bytes; float32 images of {sizes} are required"}, 422)
        y = await run_in_threadpool(run, np.frombuffer(body, np.float32).reshape(-1, *sizes))
        return Response(y.tobytes(), media_type="application/octet-stream", headers={"shape": str(y.shape)})

    return Starlette(routes=[Route("/run", answer, methods=["POST"]), Route("/", lambda _: JSONResponse({"sizes": sizes}))])


def serve(path: Path, port: int, threads: int) -> None:
    """Until it is interrupted."""
    import uvicorn

    uvicorn.run(application(path, threads), port=port, log_level="warning")


def request(port: int, body: bytes) -> bytes:
    """The answer to one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/run", body)
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {data.decode()}")
    return data


def measure(path: Path, threads: int, clients: int, seconds: float = 5.0) -> dict[str, float]:
    """Requests of one image per second, and the server's resident memory in MiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes, run = open_model(path, threads)
    x = np.random.default_rng(0).standard_normal((1, *sizes)).astype(np.float32)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(path, port, threads), daemon=True)
    server.start()
    try:
        for _ in range(300):
            try:
                found = np.frombuffer(request(port, x.tobytes()), np.float32)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        if not np.array_equal(found, run(x).reshape(-1)):
            raise RuntimeError("the server answers with other values than the model")
        counts = [0] * clients
        end = time.monotonic() + seconds

        def ask(client: int) -> None:
            while time.monotonic() < end:
                request(port, x.tobytes())
                counts[client] += 1

        asking = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        return {"requests per second": sum(counts) / seconds, "resident MiB": resident / 1024}
    finally:
        server.terminate()
        server.join()


def main() -> None:
    """Serve, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of export --native, or an .onnx file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="that work on one request")
    parser.add_argument("--measure", type=int, metavar="CLIENTS")
    given = parser.parse_args()
    if given.measure:
        for name, value in measure(given.model, given.threads, given.measure).items():
            print(f"{name}: {value:.1f}")
    else:
        serve(given.model, given.port, given.threads)


if __name__ == "__main__":
    main()
