"""Run Python with PyTorch's CUDA build on a machine without a GPU, over a stand-in for CUDA's libraries. See README.md.

    python tests/cuda_standin/run.py -m pytest -q tests/test_cuda.py
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("cudart.cpp", "cuda.cpp", "nvml.cpp", "operators.cpp", "state.h")
# PyTorch calls it when it is imported (the entry points `torch.backends`).
PLUGIN = """\
import warnings


def install():
    import torch
    import standin_operators

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that operators are taken over
        standin_operators.install()
    torch.backends.cudnn.enabled = False
"""


def build() -> Path:
    """The folder of the libraries, compiled when their sources or PyTorch change. Raises SystemExit if that cannot be."""
    import torch

    if torch.version.cuda is None:
        raise SystemExit(f"torch {torch.__version__} is no CUDA build; how to get one: {HERE / 'README.md'}")
    site = Path(torch.__file__).parents[1]
    headers = next(site.glob("nvidia/*/include/cuda_runtime_api.h"), None)
    if headers is None or not (headers.parent / "crt").exists():
        raise SystemExit("CUDA's headers are missing: pip install nvidia-cuda-runtime nvidia-cuda-crt, of PyTorch's version")
    of = hashlib.sha256("".join([torch.__version__, sys.version, *((HERE / s).read_text() for s in SOURCES)]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "prefetch_offload" / f"cuda-standin-{of.hexdigest()[:16]}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    major = torch.version.cuda.split(".")[0]
    runtime = f"libcudart.so.{major}"
    (folder / "version.map").write_text(f"{runtime} {{ global: *; }};\n")
    library = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{headers.parent}"]
    names = f"-Wl,--version-script={folder / 'version.map'}"
    run = [*library, str(HERE / "cudart.cpp"), "-o", str(folder / runtime), f"-Wl,-soname,{runtime}", names, "-ldl"]
    subprocess.run(run, check=True)
    behind = [f"-L{folder}", f"-l:{runtime}", "-ldl"]
    driver = [*library, str(HERE / "cuda.cpp"), "-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1", *behind]
    subprocess.run(driver, check=True)
    management = "libnvidia-ml.so.1"
    named = ["-o", str(folder / management), f"-Wl,-soname,{management}"]
    subprocess.run(["g++", "-O1", "-fPIC", "-shared", str(HERE / "nvml.cpp"), *named], check=True)
    lib = site / "torch" / "lib"
    includes = [f"-I{i}" for i in (headers.parent, site / "torch/include", site / "torch/include/torch/csrc/api/include")]
    includes.append(f"-I{sysconfig.get_path('include')}")
    operators = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", *includes, "-DTORCH_EXTENSION_NAME=standin_operators"]
    libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda", "-ltorch_python"]
    operators += [str(HERE / "operators.cpp"), "-o", str(folder / "standin_operators.so"), f"-L{lib}", *libraries, *behind]
    subprocess.run([*operators, f"-Wl,-rpath,{lib}"], check=True)
    (folder / "cuda_standin.py").write_text(PLUGIN)
    information = folder / "cuda_standin-0.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-standin\nVersion: 0\n")
    (information / "entry_points.txt").write_text("[torch.backends]\ncuda_standin = cuda_standin:install\n")
    (folder / "done").touch()
    return folder


def main() -> None:
    folder = build()
    root = HERE.parents[1]
    preload = [str(p) for p in (*folder.glob("libcudart.so.*"), folder / "libcuda.so.1", folder / "libnvidia-ml.so.1")]
    path = [str(folder), str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(
        LD_PRELOAD=":".join(preload), PYTHONPATH=":".join(path), TRITON_LIBCUDA_PATH=str(folder), TORCH_CPP_LOG_LEVEL="ERROR"
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
