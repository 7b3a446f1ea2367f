"""What a run found, for other tools: Neuronpedia, tables, pages that open with no server, and a folder for a hub repo."""
