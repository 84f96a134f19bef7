"""The page, served for real on a free port, with a model that has half learnt a few images by heart."""

import pytest
from page_server import serving


@pytest.fixture(scope="session")
def corrections(tmp_path_factory):
    return tmp_path_factory.mktemp("web") / "corrections"


@pytest.fixture(scope="session")
def address(recognizer, corrections):
    from paragraph_ocr.web.app import build_app

    with serving(build_app(recognizer, title="a model", corrections=corrections)) as found:
        yield found
