"""A lean client in a process of its own: N connections that ask as fast as they are answered; prints JSON.

HTTP by `http.client`, gRPC by a channel that sends ready-made bytes, so that little of the machine goes to the client.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ask = Callable[[], int]


def _http(arguments: argparse.Namespace, body: bytes) -> Ask:
    connection = http.client.HTTPConnection("127.0.0.1", arguments.port, timeout=60)
    headers = dict(pair.split("=", 1) for pair in arguments.header)

    def ask() -> int:
        connection.request("POST", arguments.path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status

    return ask


def _grpc(arguments: argparse.Namespace, body: bytes) -> Ask:
    import grpc

    limits = [(f"grpc.max_{way}_message_length", 64 * 2**20) for way in ("send", "receive")]
    channel = grpc.insecure_channel(f"127.0.0.1:{arguments.port}", [*limits, ("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask() -> int:
        try:
            call(body, timeout=60)
            return 200
        except grpc.RpcError as error:
            return int(error.code().value[0])

    return ask


def _client(make: Callable[[argparse.Namespace, bytes], Ask], arguments: argparse.Namespace, rows: list[Any]) -> None:
    ask = make(arguments, Path(arguments.body).read_bytes())
    ask()
    begun = time.perf_counter()
    warm, end = begun + arguments.warm, begun + arguments.warm + arguments.seconds
    while (start := time.perf_counter()) < end:
        status = ask()
        done = time.perf_counter()
        # Counted where it ends within the time, wherever it began: what is cut off at the end came in at the beginning.
        if warm <= done <= end:
            rows.append((status, done - start))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--protocol", choices=["http", "grpc"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/")
    parser.add_argument("--header", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--body", required=True, help="file")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--warm", type=float, default=1.0)
    arguments = parser.parse_args()
    rows: list[tuple[int, float]] = []
    make = _http if arguments.protocol == "http" else _grpc
    threads = [threading.Thread(target=_client, args=(make, arguments, rows)) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(seconds for _, seconds in rows)
    statuses = sorted({status for status, _ in rows})

    def percentile(share: float) -> float:
        return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    report = {
        "requests": len(rows),
        "per_second": len(rows) / arguments.seconds,
        "p50_ms": percentile(0.5),
        "p99_ms": percentile(0.99),
        "statuses": statuses,
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
