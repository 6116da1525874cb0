"""All studies, by name."""

from __future__ import annotations

from pipehc.studies import ablation, initialisation, overhead, retrieval, scaling, stability
from pipehc.studies.design import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (ablation.STUDY, initialisation.STUDY, overhead.STUDY, retrieval.STUDY, scaling.STUDY, stability.STUDY)
}
