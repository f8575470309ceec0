r"""Serves a trained policy to robots that speak openpi's protocol, or to allenai's harness vla-eval.

    python -m tools.serve --model RUN
    python -m tools.serve --model RUN --execute 4 --ensemble 0.01 --host 0.0.0.0 --token_file token.txt \
        --field image=observation/exterior_image_1_left \
        --field state=observation/joint_position,observation/gripper_position
    python -m tools.serve --model RUN --protocol vla-eval \
        --field agentview_rgb=images/agentview --field eye_in_hand_rgb=images/wrist

RUN is the directory of a policy's run or of an export. By default clients get whole chunks, `actions` `[H, A]`, and
carry them out themselves, as openpi's ActionChunkBroker does. With --execute or --ensemble the server does this:
clients ask at every control step and get one action, `[1, A]`; each connection has its own queue and history. vla-eval
is always served so, by default with --execute 0. SIGTERM and Ctrl-C let requests in progress end.
como_jax/serving/README.md describes fields, messages, /healthz and /metrics.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from como_jax import cli
from como_jax.errors import ConfigError
from como_jax.serving.loading import load_policy
from como_jax.serving.policy import PolicyOptions

try:
    from como_jax.serving.observations import ObservationReader
    from como_jax.serving.protocols import OPENPI, PROTOCOLS, VLA_EVAL
    from como_jax.serving.server import PolicyServer, ServerOptions
except ModuleNotFoundError as error:
    if error.name not in ("PIL", "msgpack", "prometheus_client", "websockets"):
        raise
    sys.exit(f"error: tools.serve needs {error.name}: pip install 'como_jax[serve]'")

logger = logging.getLogger("como_jax.serve")


def read_token(token: str | None, file: str | None) -> str:
    """The token of --token or --token_file, or an empty one; raises ConfigError unless it is one word of ASCII."""
    if token is None and file is None:
        return ""
    if token is not None and file is not None:
        raise ConfigError("Give --token or --token_file, not both.")
    if file is not None:
        try:
            token = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token_file {file} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("The token must be one word of ASCII characters.")
    return token


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "Directory of an exported policy or of a policy's run.", required=True)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all of this machine's.")
    flags.DEFINE_integer("port", 8000, "Port to listen at; 0 for any free one, which the log then names.")
    flags.DEFINE_enum("protocol", OPENPI, [*PROTOCOLS], "That of openpi's clients, or of allenai's harness vla-eval.")
    flags.DEFINE_string("token", None, "Token that clients must send; other users of this machine can see it in ps.")
    flags.DEFINE_string("token_file", None, "File with the token.")
    flags.DEFINE_integer("max_message_mib", 32, "Size of the largest message, in MiB.", lower_bound=1)
    flags.DEFINE_integer(
        "execute", None, "Steps of a chunk to carry out; 0 for half [whole chunks, half for vla-eval]."
    )
    flags.DEFINE_float("ensemble", None, "Average chunks, weighted by exp(-ENSEMBLE * steps since the oldest).")
    flags.DEFINE_multi_string("field", [], "NAME=FIELD of a message for a camera, state or prompt; state=FIELD,FIELD.")
    flags.DEFINE_string("default_prompt", "", "Instruction for messages without prompt.")
    flags.DEFINE_string("dataset", "", "Dataset whose normalisation to use, for policies of several robots.")
    flags.DEFINE_multi_string("sampling", [], "NAME=VALUE instead of the run's, as for experiments.rollout.")
    flags.DEFINE_integer("seed", 0, "Seed of the sampling noise.", lower_bound=0, upper_bound=2**31)


def main(arguments: Sequence[str]) -> None:
    """Serves until a signal."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    token = read_token(given.token, given.token_file)
    sampling = cli.parse_pairs("sampling", given.sampling)
    fields = {name: value.split(",") for name, value in cli.parse_pairs("field", given.field).items()}
    acting = PolicyOptions(given.execute, given.ensemble, given.dataset, sampling, given.seed)
    # The harness asks for one action at every control step.
    policy = load_policy(given.model, acting.one_by_one() if given.protocol == VLA_EVAL else acting)
    options = ServerOptions(given.host, given.port, given.protocol, token, given.max_message_mib * 2**20)
    if not token and given.host not in ("localhost", "127.0.0.1", "::1"):
        logger.warning("Anyone who reaches %s can use this server; ask for a token by --token_file.", given.host)
    PolicyServer(policy, ObservationReader(policy.inputs, fields, given.default_prompt), options).run_until_signal()


if __name__ == "__main__":
    define_flags()
    cli.run(main)
