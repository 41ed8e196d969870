"""One model out of an ensemble: what the members say of texts is kept, fused into targets, and taught to a student."""
