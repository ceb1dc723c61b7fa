"""The artefact store: stages, artefacts, local and remote copies, child processes, lineage."""
