"""Makes the options in conf/local/ available beside ldft's own: conf/local/model/mine.yaml is model=mine."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from ldft.environment import CONF_DIR


class LdftSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add conf/local/, after ldft's own options."""
        local = CONF_DIR / "local"
        if local.is_dir():
            search_path.append("ldft", f"file://{local}")
