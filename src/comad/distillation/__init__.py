"""The method: masks, aligners, fusion, objectives, health, and the run that ties them together."""
