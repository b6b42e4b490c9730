#define TOPK_TARGET avx512
#define TOPK_TARGET_NAME "avx512"
#include "target.h"
