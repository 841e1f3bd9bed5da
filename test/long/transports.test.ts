import { itWorksThrough, WAYS } from '../support/ways.js';

/** All ways; `npm test` goes those that are doors of their own. */
describe('more than forty tools, every way', () => itWorksThrough(WAYS));
