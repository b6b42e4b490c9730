#define TOPK_TARGET avx512vnni
#define TOPK_TARGET_NAME "avx512vnni"
#include "target.h"
