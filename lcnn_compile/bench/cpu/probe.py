"""What this processor can do at most: multiply-adds, 64-byte loads from L1, and bytes moved, measured by a small program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = r"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

typedef float V __attribute__((vector_size(64)));

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Best of five timed runs of `body` on every thread at once; returns units of work per second, all threads together.
template <class Body> static double rate(int threads, double units, Body body) {
    double best = 1e30;
    for (int run = 0; run < 6; run++) {
        std::vector<std::thread> pool;
        double start = now();
        for (int t = 0; t < threads; t++) pool.emplace_back(body, t);
        for (auto& thread : pool) thread.join();
        if (run) best = std::min(best, now() - start);
    }
    return threads * units / best;
}

static volatile float sink;

int main(int, char** argv) {
    const int threads = std::atoi(argv[1]);
    const long repeats = 4000000;
    const double fma = rate(threads, 12.0 * 16 * repeats, [=](int) {
        V a[12] = {}, x = a[0] + 1.0f, y = a[0] + 0.5f;
        for (int i = 0; i < 12; i++) a[i] += (float)i;
        for (long r = 0; r < repeats; r++) {
            #pragma GCC unroll 12
            for (int i = 0; i < 12; i++) a[i] = a[i] * y + x;
            asm volatile("" : "+x"(y));
        }
        for (int i = 1; i < 12; i++) a[0] += a[i];
        sink = a[0][0];
    });
    std::vector<V*> buffers(threads);
    for (auto& buffer : buffers) buffer = (V*)std::aligned_alloc(4096, 64 * sizeof(V));
    for (V* buffer : buffers) for (int i = 0; i < 64; i++) buffer[i] = V{};
    const double loads = rate(threads, 64.0 * repeats / 8, [&](int t) {
        const V* p = buffers[t];
        V a[8] = {};
        for (long r = 0; r < repeats / 8; r++) {
            asm volatile("" : "+r"(p) : : "memory");
            for (int i = 0; i < 64; i += 8) {
                #pragma GCC unroll 8
                for (int j = 0; j < 8; j++) a[j] += p[i + j];
            }
        }
        for (int i = 1; i < 8; i++) a[0] += a[i];
        sink = a[0][0];
    });
    std::printf("{\"macs\": %.4g, \"loads\": %.4g, \"bandwidth\": {", fma, loads);
    const long sizes[] = {1 << 19, 1 << 23, 1 << 28};
    for (long size : sizes) {
        const long count = size / 2 / sizeof(V), passes = (1L << 29) / size;
        std::vector<V*> from(threads), to(threads);
        for (int t = 0; t < threads; t++) {
            from[t] = (V*)std::aligned_alloc(4096, size / 2);
            to[t] = (V*)std::aligned_alloc(4096, size / 2);
            for (long i = 0; i < count; i++) from[t][i] = to[t][i] = V{};
        }
        const double bytes = rate(threads, (double)size * passes, [&](int t) {
            V *x = from[t], *y = to[t];
            for (long p = 0; p < passes; p++) {
                for (long i = 0; i < count; i++) y[i] = x[i] * 1.5f;
                asm volatile("" : : "r"(y) : "memory");
            }
        });
        std::printf("%s\"%ld\": %.4g", size == sizes[0] ? "" : ", ", size, bytes);
    }
    std::printf("}}\n");
}
"""


@dataclass(frozen=True)
class Peak:
    """Rates per second with all threads busy.

    Attributes:
        macs: float32 multiply-adds.
        loads: 64-byte loads from L1.
        bandwidth: bytes read and written, by working set in bytes per thread.
    """

    macs: float
    loads: float
    bandwidth: dict[int, float]

    def bytes_per_second(self, working_set: float) -> float:
        """Bandwidth of the smallest measured working set that holds this one."""
        fitting = [size for size in sorted(self.bandwidth) if size >= working_set]
        return self.bandwidth[fitting[0] if fitting else max(self.bandwidth)]

    def __str__(self) -> str:
        moved = ", ".join(f"{rate / 1e9:.0f} GB/s in {size >> 10} KiB" for size, rate in self.bandwidth.items())
        return f"{self.macs / 1e9:.0f} G multiply-adds/s, {self.loads / 1e9:.1f} G loads of 64 bytes/s, {moved}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"macs": self.macs, "loads": self.loads, "bandwidth": {str(k): v for k, v in self.bandwidth.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Peak:
        """What ``to_dict`` gave."""
        return cls(values["macs"], values["loads"], {int(size): rate for size, rate in values["bandwidth"].items()})


def compiler() -> str | None:
    """The user's C++ compiler: $CXX, or the first usual name that exists."""
    return next(
        (path for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def probe(threads: int) -> Peak | None:
    """Measure, or None where there is no compiler that can build the probe."""
    command = compiler()
    if command is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text(SOURCE)
        build = [command, "-O3", "-march=native", "-mprefer-vector-width=512", "-std=c++17", "-pthread"]
        for flags in (build, [flag for flag in build if "prefer" not in flag]):
            if subprocess.run([*flags, str(source), "-o", str(program)], capture_output=True).returncode == 0:
                break
        else:
            return None
        result = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True)
    return Peak.from_dict(json.loads(result.stdout))
