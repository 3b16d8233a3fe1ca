"""Package metadata. The parts live at the top of the tree and are linked into `headrace/` (see docs/layout.md)."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "headrace/_version.py").read_text().split('"')[-2]

# The base install is the client: no torch, no transformers.
CLIENT = [
    "click>=8.1",
    "jinja2>=3.1.6",
    "msgpack>=1.1",
    "pyzmq>=26.2",
    "tokenizers>=0.22",
]
SERVE = [
    "fastapi>=0.115",
    "gguf>=0.17",
    "prometheus-client>=0.21",
    "pydantic>=2.9",
    "safetensors>=0.6",
    "torch>=2.11",
    "transformers>=5.17",
    "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "uvicorn>=0.34",
]
BENCH = ["matplotlib>=3.9"]
TEST = [
    "hypothesis>=6.120",
    "httpx>=0.27",
    "matplotlib>=3.9",
    "mypy>=2.1",
    "numpy<2.4",  # Triton's interpreter fails on a range() over a runtime value with newer ones
    "openai>=2.0",
    "playwright>=1.50",
    "psutil>=6.0",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.15",
    "setuptools>=77",  # builds the wheel that a test looks into
]

setup(
    name="headrace",
    version=VERSION,
    description="A multi-process GPU worker pool behind a message queue, serving kernel-injected Hugging Face models.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["headrace", "headrace.*"]),
    package_data={
        "headrace": ["py.typed"],
        "headrace.gateway": ["static/*", "static/**/*"],
        "headrace.kernels": ["tuned/*.json"],
    },
    install_requires=CLIENT,
    extras_require={"serve": SERVE, "bench": SERVE + BENCH, "test": TEST, "all": SERVE + TEST},
    entry_points={"console_scripts": ["headrace = headrace.scripts.main:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
)
