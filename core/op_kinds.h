// The arguments of a line of ops.def as text, a letter for each: the slots of the op's argument struct in order, and
// between them the arguments that have none (dtype and shape). Include it before ops.def where PB_OP wants that text.
#ifndef PB_OP_KINDS_H
#define PB_OP_KINDS_H

#define PB_IN(name) "i"
#define PB_OPT(name) "?"
#define PB_OUT(name) "o"
#define PB_MUT(name) "m"
#define PB_INS(name) "I"
#define PB_MUTS(name) "M"
#define PB_INT(name) "n"
#define PB_FLOAT(name) "f"
#define PB_DTYPE(name) "d"
#define PB_SHAPE(name) "s"

#endif
