"""Library of vlmoe: data, model, routing, objectives and training of vision-language sparse transformers."""
