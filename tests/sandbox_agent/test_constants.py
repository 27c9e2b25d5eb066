from __future__ import annotations

import enum
import struct

from ray_backend.sandbox.agent import constants
from ray_backend.sandbox.protocol import frames, replies, requests


def test_header_is_made_from_the_table():
    assert constants.HEADER.read_text(encoding="ascii") == constants.header_text(), (
        "run: python -m ray_backend.sandbox.agent.constants"
    )


def test_every_name_of_the_table_is_in_the_header():
    text = constants.header_text()
    for name, value in vars(constants).items():
        if name.isupper() and not name.startswith("_") and isinstance(value, int):
            assert f"#define {name} {value}" in text, name
        elif isinstance(value, type) and issubclass(value, enum.Enum) and value is not enum.Enum:
            for member in value:
                assert f"_{member.name} = {int(member.value)}," in text, member


def test_no_two_frames_share_a_number_and_the_high_bit_says_who_speaks():
    numbers = [int(kind) for kind in constants.FrameType]
    assert len(numbers) == len(set(numbers))
    first_of_the_agent = numbers.index(constants.FrameType.WELCOME)
    assert all(number < 0x80 for number in numbers[:first_of_the_agent])
    assert all(number >= 0x80 for number in numbers[first_of_the_agent:])


def test_magic_begins_with_a_byte_of_its_own():
    assert constants.MAGIC.count(constants.MAGIC[:1]) == 1
    assert 0 not in constants.MAGIC
    (length,) = struct.unpack("<I", constants.MAGIC[:4])
    assert length > constants.FRAME_BODY_MAX, "a magic must not pass for the start of a frame"


def test_sizes_are_those_that_the_codec_packs():
    assert replies.STAT.size == constants.STAT_BYTES
    assert requests.EXEC_HEAD.size == constants.EXEC_HEAD_BYTES
    assert frames.HEADER.size == constants.FRAME_HEADER_BYTES
