#define TOPK_TARGET avx2
#define TOPK_TARGET_NAME "avx2"
#include "target.h"
