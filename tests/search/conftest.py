import pytest
from quick_search import make_conf


@pytest.fixture
def conf(tmp_path):
    return make_conf(tmp_path / "conf")
