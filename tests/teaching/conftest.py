"""A tiny Llama, quantised and adapted, and the check that a picture can be read."""

from __future__ import annotations

import itertools

import pytest
from llama_helpers import adapt, load_4bit, save_llama, text_boxes


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def quantised(llama_folder):
    return load_4bit(llama_folder)


@pytest.fixture
def adapted(quantised):
    return adapt(quantised)


@pytest.fixture
def assert_readable():
    def check(fig, width_px=800):
        boxes = text_boxes(fig)
        assert boxes
        width, height = fig.get_size_inches() * fig.dpi
        assert round(width) == width_px
        for text, box in boxes:
            assert text.get_fontsize() >= 11, text.get_text()
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
            assert inside, (text.get_text(), box)
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            clash = a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
            assert not clash, (one.get_text(), other.get_text(), a, b)

    return check
