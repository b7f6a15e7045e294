"""DeepSeek-V3 for AWS Trainium2 on NeuronX Distributed Inference."""
