#define TOPK_TARGET avx512screen
#define TOPK_TARGET_NAME "avx512screen"
#define TOPK_SCREENS
#include "target.h"
