"""llama.cpp's server on a GGUF file, by the package ``xllamacpp``: a real engine that others wrote.

``python3 run.py setup --engines`` makes an environment that has it, and nothing else::

    .venv-engines/bin/python eval/benchmarks/llama_engine.py model.gguf 8101 --slots 4 --context 1024
"""

from __future__ import annotations

import argparse
import signal


def main() -> None:
    parser = argparse.ArgumentParser(description="serve a GGUF file by llama.cpp, until killed")
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--slots", type=int, default=4, help="sequences at once")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = given.model, given.port
    params.n_parallel, params.n_ctx = given.slots, given.slots * given.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    params.cont_batching = params.endpoint_metrics = params.endpoint_slots = True
    server = xllamacpp.Server(params)
    print(f"serving on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
