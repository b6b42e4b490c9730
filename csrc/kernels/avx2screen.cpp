#define TOPK_TARGET avx2screen
#define TOPK_TARGET_NAME "avx2screen"
#define TOPK_SCREENS
#include "target.h"
